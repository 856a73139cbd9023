#!/usr/bin/env python3
"""Checks the manifests beside this file without a cluster: every field against a schema of exactly the fields that they use (anything
else is an error), and what the API server checks beyond the schema: rules that need each other, names that have to be there. At the end
each kind of mistake is made on purpose, and has to be found.

The schema is written from the reference of batch/v1 and v1 (Kubernetes 1.33). All of the API is in `pip install kubernetes-validate`:
kubernetes-validate --strict -k 1.33 scripts/kubernetes/*.yaml

    python3 scripts/kubernetes/check.py            needs PyYAML
"""

import copy
import pathlib
import re
import sys

import yaml

# A schema is a type, a set of the allowed values, [schema] for a list, {name: schema} for an object in which a name with "!" has to be
# there, or a function that says what is expected where a value is wrong.


def matching(pattern, what):
    return lambda value: None if isinstance(value, str) and re.fullmatch(pattern, value) else what


def between(low, high):
    expected = f"a whole number from {low} to {high}"
    return lambda value: None if type(value) is int and low <= value <= high else expected


def labels(value):
    good = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    return None if good else "names with texts"


NAME = matching(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "a DNS label")
QUANTITY = matching(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?", "a quantity, as text")
RESOURCES = {"cpu": QUANTITY, "memory": QUANTITY}
CONTAINER = {
    "name!": NAME,
    "image!": str,
    "command": [str],
    "args": [str],
    "resources": {"requests": RESOURCES, "limits": RESOURCES},
    "securityContext": {"allowPrivilegeEscalation": bool, "readOnlyRootFilesystem": bool},
    "volumeMounts": [{"name!": NAME, "mountPath!": matching(r"/[^:]*", "an absolute path"), "readOnly": bool}],
}
POD = {
    "restartPolicy!": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds": between(0, 86400),
    "initContainers": [CONTAINER],
    "containers!": [CONTAINER],
    "volumes": [{"name!": NAME, "persistentVolumeClaim!": {"claimName!": NAME, "readOnly": bool}}],
}
RULE = {
    "action!": {"Ignore", "FailJob", "FailIndex", "Count"},
    "onExitCodes": {"containerName": NAME, "operator!": {"In", "NotIn"}, "values!": [between(0, 255)]},
    "onPodConditions": [{"type!": {"DisruptionTarget"}, "status": {"True", "False", "Unknown"}}],
}
JOB = {
    "apiVersion!": {"batch/v1"},
    "kind!": {"Job"},
    "metadata!": {"name!": NAME, "labels": labels},
    "spec!": {
        "completionMode": {"Indexed", "NonIndexed"},
        "completions": between(1, 100_000),
        "parallelism": between(1, 100_000),
        "backoffLimit": between(0, 2**31 - 1),
        "backoffLimitPerIndex": between(0, 2**31 - 1),
        "maxFailedIndexes": between(0, 100_000),
        "podFailurePolicy": {"rules!": [RULE]},
        "template!": {"metadata": {"labels": labels}, "spec!": POD},
    },
}


def faults(schema, value, place=""):
    """What is wrong with a value, as sentences."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place}: expected an object, found {value!r}"]
        known = {name.rstrip("!"): below for name, below in schema.items()}
        found = [f"{place}: {name} is missing" for name in schema if name.endswith("!") and name[:-1] not in value]
        found += [f"{place}: unknown field {name}" for name in value if name not in known]
        return found + [f for name in value if name in known for f in faults(known[name], value[name], f"{place}.{name}")]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{place}: expected a list, found {value!r}"]
        return [f for i, one in enumerate(value) for f in faults(schema[0], one, f"{place}[{i}]")]
    if isinstance(schema, set):
        return [] if isinstance(value, str) and value in schema else [f"{place}: expected one of {sorted(schema)}, found {value!r}"]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{place}: expected {schema.__name__}, found {value!r}"]
    expected = schema(value)
    return [f"{place}: expected {expected}, found {value!r}"] if expected else []


def relations(job):
    """What a manifest of the right shape may still get wrong."""
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    containers = pod["containers"] + pod.get("initContainers", [])
    names = [container["name"] for container in containers]
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    if len(set(names)) != len(names) or len(set(volumes)) != len(volumes):
        yield "a container or a volume has the name of another"
    if rules and pod["restartPolicy"] != "Never":
        yield "podFailurePolicy needs restartPolicy: Never"
    if "backoffLimitPerIndex" in spec and spec.get("completionMode") != "Indexed":
        yield "backoffLimitPerIndex needs completionMode: Indexed"
    if "backoffLimitPerIndex" not in spec and ("maxFailedIndexes" in spec or any(r["action"] == "FailIndex" for r in rules)):
        yield "maxFailedIndexes and FailIndex need backoffLimitPerIndex"
    if spec.get("parallelism", 1) > spec.get("completions", 1):
        yield "more pods at a time than there are"
    for rule in rules:
        codes = rule.get("onExitCodes", {})
        values = codes.get("values", [])
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield "a rule has exit codes or conditions, one of them"
        if values != sorted(set(values)) or codes.get("operator") == "In" and 0 in values:
            yield f"exit codes rise, and 0 is no failure: {values}"
        if codes.get("containerName", names[0]) not in names:
            yield f"no container {codes['containerName']}"
    for container in containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"no volume {mount['name']}"
        for argument in container.get("args", []):
            workers = re.fullmatch(r"--worker=auto/([0-9]+)", argument)
            if workers and int(workers[1]) != spec.get("completions"):
                yield f"{argument}, but completions: {spec.get('completions')}"
    if spec.get("completionMode") == "Indexed" and not any(a.startswith("--worker=auto/") for c in containers for a in c.get("args", [])):
        yield "no container takes its share by --worker=auto/N"


def check(job):
    return faults(JOB, job, "job") or list(relations(job))


def set_at(job, path, value):
    *way, last = path
    for step in way:
        job = job[step]
    if value is None:
        del job[last]
    else:
        job[last] = value


POD_PATH = ("spec", "template", "spec")
MISTAKES = [
    (("spec", "completion"), 8),
    (("spec", "completions"), "8"),
    (("spec", "completions"), 9),
    (("spec", "completionMode"), "Indexd"),
    (("spec", "completionMode"), None),
    (("spec", "parallelism"), 9),
    (("spec", "backoffLimitPerIndex"), None),
    (("spec", "podFailurePolicy", "rules", 1, "action"), "Retry"),
    (("spec", "podFailurePolicy", "rules", 1, "onExitCodes", "values"), [75, 2]),
    (("spec", "podFailurePolicy", "rules", 1, "onExitCodes", "values"), [0]),
    (("spec", "podFailurePolicy", "rules", 1, "onExitCodes", "containerName"), "other"),
    (("spec", "podFailurePolicy", "rules", 1, "onExitCodes"), None),
    (("spec", "podFailurePolicy", "rules", 0, "onPodConditions", 0, "status"), True),
    ((*POD_PATH, "restartPolicy"), "OnFailure"),
    ((*POD_PATH, "restartPolicy"), None),
    ((*POD_PATH, "containers", 0, "name"), "Potstill"),
    ((*POD_PATH, "containers", 0, "image"), None),
    ((*POD_PATH, "containers", 0, "args", 1), "--worker=auto/9"),
    ((*POD_PATH, "containers", 0, "args", 1), "--worker=0/8"),
    ((*POD_PATH, "containers", 0, "resources", "requests", "cpu"), 16),
    ((*POD_PATH, "containers", 0, "volumeMounts", 2, "name"), "elsewhere"),
    ((*POD_PATH, "volumes", 2, "emptyDir"), {}),
]


def main():
    folder = pathlib.Path(__file__).parent
    wrong, jobs = [], {}
    for file in sorted(folder.glob("*.yaml")):
        for job in yaml.safe_load_all(file.read_text()):
            jobs[file.name] = job
            wrong += [f"{file.name}: {fault}" for fault in check(job)]
    if "precompute.yaml" not in jobs:
        wrong.append("precompute.yaml is missing")
    else:
        for path, value in MISTAKES:
            job = copy.deepcopy(jobs["precompute.yaml"])
            set_at(job, path, value)
            if not check(job):
                wrong.append(f"a mistake is not found: {'.'.join(map(str, path))} = {value!r}")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if not wrong:
        print(f"{', '.join(jobs)}: good; {len(MISTAKES)} mistakes made on purpose, all found")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
