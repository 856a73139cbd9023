//! Records and rows that claim what they do not hold: refused before they are written, and when they are read.

use crate::made::{described, modes, record_as};
use potstill_cache::{CacheWriter, CodecError, Record, SoftTargets, Storage, Target, WriterOptions};

/// What the writer of a cache that is stored so says to this record.
fn said(storage: &Storage, record: &Record) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::open(dir.path(), &described(storage, &[], 1, 1), WriterOptions::default()).unwrap();
    writer.append(record).map_or_else(|error| error.to_string(), |()| "taken".into())
}

fn mode(name: &str) -> Storage {
    modes().into_iter().find(|(n, ..)| *n == name).unwrap().1
}

/// A record of `storage` whose first target is changed.
fn with(storage: &Storage, change: impl Fn(&mut Target<'_>)) -> Record {
    let record = record_as(3, 9, storage, &[]);
    let mut targets = SoftTargets::default();
    for i in 0..record.targets.len() {
        let mut target = record.targets.position(i);
        if i == 0 {
            change(&mut target);
        }
        targets.push_target(&target);
    }
    Record { targets, ..record }
}

#[test]
fn a_log_sum_exp_belongs_to_its_logits() {
    let exact = mode("exact");
    assert_eq!(said(&exact, &with(&exact, |_| {})), "taken");
    for (lse, expected) in [
        (0.0, "logits of at most their log-sum-exp 0"),
        (1000.0, "kept and tail probability of"),
        (f32::NAN, "finite logits and log-sum-exps"),
    ] {
        let found = said(&exact, &with(&exact, |target| target.logsumexp = Some(lse)));
        assert!(found.contains(expected), "{lse}: {found}");
    }
}

#[test]
fn draws_are_left_out_only_where_there_is_nothing_to_draw_from() {
    let hybrid = mode("hybrid");
    let none = |tail| {
        move |target: &mut Target<'_>| {
            (target.sample_ids, target.sample_counts) = (&[], &[]);
            if let Some(tail) = tail {
                (target.ids, target.logprobs, target.tail_logprob) = (&[7], &[-1e-6], tail);
            }
        }
    };
    assert!(said(&hybrid, &with(&hybrid, none(None))).contains("expected position 0: 9 draws, found 0"));
    let first = |text: String| text.split(": ").nth(1).map(String::from).unwrap_or(text);
    assert_eq!(first(said(&hybrid, &with(&hybrid, none(Some(f32::NEG_INFINITY))))), "taken");
}

#[test]
fn a_cutoff_keeps_what_its_rule_keeps() {
    let compact = mode("compact");
    let found = said(
        &compact,
        &with(&compact, |target| {
            (target.ids, target.logprobs, target.tail_logprob) = (&[7, 9], &[-0.02, -4.0], -6.0);
        }),
    );
    assert!(found.contains("the entries that cutoff 6 p>=5e-2 keeps, found 2, of which it keeps 1"), "{found}");
}

#[test]
fn a_codec_error_is_a_number_or_unknown() {
    let standard = mode("standard");
    let base = record_as(3, 9, &standard, &[]);
    for (kl, fine) in [(0.5, true), (f32::NAN, true), (-0.5, false), (f32::INFINITY, false)] {
        let record = Record { codec: CodecError { kl_sum: kl, kl_max: kl }, ..base.clone() };
        assert_eq!(said(&standard, &record) == "taken", fine, "{kl}: {}", said(&standard, &record));
    }
}
