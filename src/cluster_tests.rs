//! Tests of what engines say: each of them, halves of it, and contradictions.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;

/// What is found in an environment of these variables, written `NAME=value NAME=value`.
fn seen(stated: Option<u32>, variables: &str) -> Result<(u32, u32), String> {
    let set: Vec<(&str, &str)> = variables.split(' ').filter_map(|one| one.split_once('=')).collect();
    let variable = |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
    worker(stated, &variable).map(|said| (said.worker.index, said.worker.of)).map_err(|e| e.0)
}

/// The variables of one task of a Slurm array.
fn array(id: u32, count: u32, min: u32, max: u32, step: u32) -> String {
    format!("{ARRAY_ID}={id} {ARRAY_COUNT}={count} {ARRAY_MIN}={min} {ARRAY_MAX}={max} {ARRAY_STEP}={step}")
}

#[test]
fn each_engine_is_understood() {
    assert_eq!(seen(None, &array(0, 8, 0, 7, 1)), Ok((0, 8)));
    assert_eq!(seen(None, &array(7, 8, 0, 7, 1)), Ok((7, 8)));
    assert_eq!(seen(None, &array(1, 8, 1, 8, 1)), Ok((0, 8)));
    assert_eq!(seen(None, &array(8, 4, 2, 8, 2)), Ok((3, 4)));
    // 0-15:4 ends at 12, and one task alone is a whole array.
    assert_eq!(seen(None, &array(12, 4, 0, 12, 4)), Ok((3, 4)));
    assert_eq!(seen(None, &array(5, 1, 5, 5, 1)), Ok((0, 1)));
    assert_eq!(seen(None, "JOB_COMPLETION_INDEX=3 JOB_COMPLETIONS=4"), Ok((3, 4)));
    assert_eq!(seen(Some(4), "JOB_COMPLETION_INDEX=3"), Ok((3, 4)));
    assert_eq!(seen(None, "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0"), Ok((0, 1)));
    assert_eq!(seen(None, "SKYPILOT_NODE_RANK=1 SKYPILOT_NUM_NODES=2"), Ok((1, 2)));
}

#[test]
fn what_is_chosen_is_said_with_its_variables() {
    let variable =
        |name: &str| array(3, 8, 1, 8, 1).split(' ').find_map(|v| v.strip_prefix(&format!("{name}=")).map(OsString::from));
    let said = worker(None, &variable).unwrap();
    let by = "SLURM_ARRAY_TASK_ID=3, SLURM_ARRAY_TASK_COUNT=8, SLURM_ARRAY_TASK_MIN=1, SLURM_ARRAY_TASK_STEP=1";
    assert_eq!(said, Said { worker: Worker { index: 2, of: 8 }, by: by.into() });
}

#[test]
fn outside_of_any_engine_all_that_was_looked_for_is_listed() {
    let error = seen(None, "WORLD_SIZE=4 SLURM_JOB_ID=7").unwrap_err();
    let expected = "worker = auto: no engine says which worker this is; looked for SLURM_ARRAY_TASK_ID (Slurm array), \
                    JOB_COMPLETION_INDEX (Kubernetes Indexed Job), RANK (torchrun), SKYPILOT_NODE_RANK (SkyPilot); \
                    give --worker I/N";
    assert_eq!(error, expected);
}

#[test]
fn half_of_what_is_needed_is_an_error() {
    let cases = [
        (
            None,
            "JOB_COMPLETION_INDEX=3",
            "JOB_COMPLETION_INDEX = 3 (Kubernetes Indexed Job), but not of how many; set JOB_COMPLETIONS",
        ),
        (None, "RANK=3", "RANK = 3 (torchrun), but not of how many; set WORLD_SIZE, or give --worker auto/N"),
        (
            None,
            "SLURM_ARRAY_TASK_ID=3 SLURM_ARRAY_TASK_COUNT=8",
            "SLURM_ARRAY_TASK_ID = 3 (Slurm array), but SLURM_ARRAY_TASK_MIN, SLURM_ARRAY_TASK_MAX, SLURM_ARRAY_TASK_STEP not set",
        ),
        (None, "RANK=1 WORLD_SIZE=", "WORLD_SIZE = \"\": expected a whole number"),
        (None, "RANK=-1 WORLD_SIZE=2", "RANK = \"-1\": expected a whole number"),
        (None, "RANK=+1 WORLD_SIZE=2", "RANK = \"+1\": expected a whole number"),
        (None, "RANK=99999999999 WORLD_SIZE=2", "RANK = \"99999999999\": expected a whole number"),
    ];
    for (stated, variables, expected) in cases {
        let error = seen(stated, variables).unwrap_err();
        assert!(error.contains(expected), "{variables}: {error}");
    }
}

#[test]
fn contradictions_are_errors() {
    let cases = [
        (None, "RANK=2 WORLD_SIZE=2".to_string(), "RANK = 2: expected a worker from 0 to below 2"),
        (None, "RANK=0 WORLD_SIZE=0".into(), "RANK = 0: expected a worker from 0 to below 0"),
        (Some(8), "RANK=2 WORLD_SIZE=4".into(), "worker = auto/8: WORLD_SIZE = 4, but auto/8 says 8"),
        (Some(2), "JOB_COMPLETION_INDEX=2".into(), "JOB_COMPLETION_INDEX = 2: expected a worker from 0 to below 2"),
        (
            None,
            format!("{} RANK=0 WORLD_SIZE=4", array(3, 8, 0, 7, 1)),
            "SLURM_ARRAY_TASK_STEP=1 means worker 3/8, but RANK=0, WORLD_SIZE=4 means worker 0/4; give --worker I/N",
        ),
        // Lists such as 1,2,7 and ids beside the array.
        (None, array(7, 3, 1, 7, 1), "are no evenly spaced array; submit such an array with --worker auto/N"),
        (None, array(3, 4, 0, 6, 2), "are no evenly spaced array"),
        (None, array(0, 4, 1, 4, 1), "are no evenly spaced array"),
        (None, array(5, 4, 1, 4, 1), "are no evenly spaced array"),
        (None, array(1, 4, 1, 4, 0), "are no evenly spaced array"),
        (
            Some(8),
            array(3, 8, 1, 8, 1),
            "SLURM_ARRAY_TASK_MIN = 1 and SLURM_ARRAY_TASK_MAX = 8: expected the array 0-7, whose ids",
        ),
        (Some(8), array(2, 8, 0, 14, 2), "SLURM_ARRAY_TASK_MIN = 0 and SLURM_ARRAY_TASK_MAX = 14: expected the array 0-7"),
        (Some(8), array(8, 1, 8, 8, 1), "SLURM_ARRAY_TASK_ID = 8: expected a worker from 0 to below 8"),
    ];
    for (stated, variables, expected) in cases {
        let error = seen(stated, &variables).unwrap_err();
        assert!(error.contains(expected), "{variables}: {error}");
    }
}

#[test]
fn engines_that_agree_are_one_and_some_tasks_can_run_again() {
    let both = format!("{} RANK=3 WORLD_SIZE=8", array(3, 8, 0, 7, 1));
    assert_eq!(seen(None, &both), Ok((3, 8)));
    // Tasks 3 and 6 of 8, submitted again: their ids are the workers, for the number of all of them is given.
    assert_eq!(seen(Some(8), &array(6, 2, 3, 6, 3)), Ok((6, 8)));
    assert_eq!(seen(Some(8), &array(3, 1, 3, 3, 1)), Ok((3, 8)));
    assert_eq!(seen(Some(8), &array(3, 8, 0, 7, 1)), Ok((3, 8)));
}

#[test]
fn wishes_are_read_exactly() {
    assert_eq!(Wish::of("3/8"), Some(Wish::Named(Worker { index: 3, of: 8 })));
    assert_eq!((Wish::of("auto"), Wish::of("auto/8")), (Some(Wish::Auto(None)), Some(Wish::Auto(Some(8)))));
    for wrong in ["", "8/8", "auto/0", "auto/", "auto/+8", "automatic", "Auto", "auto/8/8"] {
        assert_eq!(Wish::of(wrong), None, "{wrong}");
    }
}
