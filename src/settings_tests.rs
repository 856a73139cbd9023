//! Tests of the tables: rules accept what they say, refuse the rest, and name exactly the fields of the settings they guard.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use potstill_pipeline::adapter::MergeConfig;
use potstill_pipeline::precompute::PrecomputeConfig;
use potstill_pipeline::train::TrainConfig;

#[test]
fn each_rule_refuses_what_lies_just_outside() {
    let whole = |n| Value::Integer(n);
    let real = Value::Float;
    let word = |s: &str| Value::String(s.into());
    let cases = [
        (Rule::Whole(1, 1024), vec![whole(1), whole(1024)], vec![whole(0), whole(1025), real(3.0), word("3")]),
        (Rule::Positive, vec![real(1e-9), whole(2)], vec![real(0.0), real(-1.0), real(f64::NAN), real(f64::INFINITY), word("x")]),
        (Rule::NotNegative, vec![real(0.0), real(0.3)], vec![real(-1e-9), real(f64::NAN)]),
        (Rule::Decay, vec![real(0.0), real(0.999)], vec![real(1.0), real(-0.1)]),
        (Rule::Share, vec![real(1e-9), real(0.999)], vec![real(0.0), real(1.0), real(f64::NAN), whole(1)]),
        (Rule::Ratio, vec![real(0.0), real(1.0), whole(1)], vec![real(-1e-9), real(1.1), real(f64::NAN), word("x")]),
        (
            Rule::Positives,
            vec![Value::Array(vec![]), Value::Array(vec![real(1.5), real(2.0)])],
            vec![real(2.0), Value::Array(vec![real(0.0)]), Value::Array(vec![word("2")])],
        ),
        (
            Rule::Modules,
            vec![word("all"), Value::Array(vec![word("q_proj"), word("down_proj")])],
            vec![word("q_proj"), Value::Array(vec![]), Value::Array(vec![word("lm_head")]), whole(1), word("")],
        ),
        (Rule::OneOf(&["turns", "right"]), vec![word("right")], vec![word("left"), word("Right"), word("")]),
        (Rule::Device, vec![word("auto"), word("cuda:3")], vec![word("gpu"), word("cuda:"), word("cuda:-1")]),
        (Rule::Path, vec![word("a b")], vec![word(""), whole(1)]),
        (Rule::Paths, vec![Value::Array(vec![word("a")])], vec![Value::Array(vec![]), Value::Array(vec![whole(1)])]),
        (
            Rule::Worker,
            vec![word("0/1"), word("7/8"), word("auto"), word("auto/8")],
            vec![word("8/8"), word("1/0"), word("auto/0"), word("auto/"), word("auto/x"), word("auto8"), word("3"), whole(3)],
        ),
        (Rule::Switch, vec![Value::Boolean(false)], vec![word("false"), whole(0)]),
    ];
    for (rule, good, bad) in cases {
        good.iter().for_each(|value| assert!(rule.holds(value), "{rule:?} should allow {value:?}"));
        bad.iter().for_each(|value| assert!(!rule.holds(value), "{rule:?} should refuse {value:?}"));
    }
}

#[test]
fn a_share_of_all_mass_is_at_most_all_of_it() {
    let rule = TRAIN.find("max_unknown_mass").unwrap().rule;
    assert!(rule.holds(&Value::Float(1.0)) && !rule.holds(&Value::Float(1.5)));
    assert_eq!(
        (rule.expected().as_str(), rule.read("1"), rule.shape(Value::Integer(1))),
        ("a number from 0 to 1", Value::Float(1.0), Value::Float(1.0))
    );
}

#[test]
fn variables_are_read_by_the_rule() {
    assert_eq!(Rule::Positive.read("1e-4"), Value::Float(1e-4));
    assert_eq!(Rule::Positive.read("2"), Value::Float(2.0));
    assert_eq!(Rule::Positives.read("1.5, 2"), Value::Array(vec![Value::Float(1.5), Value::Float(2.0)]));
    assert_eq!(Rule::Positives.shape(Value::Integer(2)), Value::Array(vec![Value::Float(2.0)]));
    assert!(!Rule::Positives.holds(&Rule::Positives.read("1.5;2")));
    let names = |list: &[&str]| Value::Array(list.iter().map(|name| Value::String((*name).into())).collect());
    assert_eq!(Rule::Modules.read("q_proj, v_proj"), names(&["q_proj", "v_proj"]));
    assert_eq!(Rule::Modules.read("o_proj"), names(&["o_proj"]));
    for all in [Rule::Modules.read("all"), Rule::Modules.shape(names(&["all"]))] {
        assert_eq!(all, Value::String("all".into()));
    }
    assert_eq!(Rule::Modules.nearest(&names(&["q_proj", "gate_prj"])), Some("gate_proj"));
    assert_eq!(Rule::Modules.nearest(&names(&["embed_tokens"])), None);
    assert_eq!(Rule::Path.read("123"), Value::String("123".into()));
    assert_eq!(Rule::Switch.read("false"), Value::Boolean(false));
    let two = Value::Array(vec![Value::String("a".into()), Value::String("b,c".into())]);
    assert_eq!(Rule::Paths.read(r#"["a", "b,c"]"#), two);
    assert_eq!(Rule::Paths.read("a b.jsonl"), Value::Array(vec![Value::String("a b.jsonl".into())]));
    assert!(!Rule::Whole(1, 9).holds(&Rule::Whole(1, 9).read("many")));
}

#[test]
fn near_names_are_found_and_far_ones_are_not() {
    assert_eq!(TRAIN.nearest("temprature"), Some("temperature"));
    assert_eq!(TRAIN.nearest("warmup-steps"), Some("warmup_steps"));
    assert_eq!(TRAIN.nearest("Lr"), Some("lr"));
    assert_eq!(TRAIN.nearest("colour"), None);
    assert_eq!((distance("kitten", "sitting"), distance("", "abc"), distance("abc", "")), (3, 3, 3));
}

/// The keys a settings struct has, all optional ones filled in by the caller.
fn keys(config: &impl serde::Serialize) -> Vec<String> {
    let json = serde_json::to_value(config).expect("settings are plain data");
    let mut keys: Vec<String> = json.as_object().expect("a struct").keys().cloned().collect();
    keys.sort();
    keys
}

fn names(section: &Section) -> Vec<String> {
    let mut names: Vec<String> = section.settings.iter().map(|s| s.key.to_string()).collect();
    names.sort();
    names
}

#[test]
fn tables_name_every_field_and_no_other() {
    // JSON writes an absent value as null, so optional fields are named too.
    assert_eq!(names(&PRECOMPUTE), keys(&PrecomputeConfig::default()));
    // Of cache and data only what is given is written.
    let both = TrainConfig { cache: "c".into(), data: vec!["d".into()], ..TrainConfig::default() };
    assert_eq!(names(&TRAIN), keys(&both));
    assert_eq!(names(&MERGE), keys(&MergeConfig::default()));
}

#[test]
fn defaults_keep_the_rules() {
    let check = |section: &Section, table: toml::Table| {
        for (key, value) in table {
            let rule = section.find(&key).expect("a known key").rule;
            let not_given =
                matches!(&value, Value::String(s) if s.is_empty()) || matches!(&value, Value::Array(a) if a.is_empty());
            assert!(not_given || rule.holds(&rule.shape(value.clone())), "{}.{key} = {value}", section.name);
        }
    };
    check(&PRECOMPUTE, toml::Table::try_from(PrecomputeConfig::default()).expect("plain data"));
    check(&TRAIN, toml::Table::try_from(TrainConfig::default()).expect("plain data"));
    check(&MERGE, toml::Table::try_from(MergeConfig::default()).expect("plain data"));
}
