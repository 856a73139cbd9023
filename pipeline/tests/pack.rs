//! Packing and the shift, on lists small enough to check by eye.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use potstill_pipeline::data::Example;
use potstill_pipeline::data::pack::{Pack, Sequence, plan};

#[test]
fn the_drawing_in_the_file_holds() {
    let mask = |marks: &str| marks.bytes().map(|b| b == b'x').collect::<Vec<bool>>();
    let a = Example { seq_id: 0, input_ids: vec![10, 11, 12, 13], scored: mask("..xx") };
    let b = Example { seq_id: 1, input_ids: vec![20, 21, 22], scored: mask("x.x") };
    assert_eq!(a.positions(), [1, 2]);
    assert_eq!(b.positions(), [1], "a first token has nothing before it");
    let (pa, pb) = (a.positions(), b.positions());
    let pack = Pack::new([(&a, &pa), (&b, &pb)].map(|(e, p)| Sequence { input_ids: &e.input_ids, positions: p }));
    assert_eq!(pack.input_ids(), [10, 11, 12, 13, 20, 21, 22]);
    assert_eq!(pack.segments(), [0, 4, 7]);
    assert_eq!(pack.positions(), [0, 1, 2, 3, 0, 1, 2]);
    assert_eq!(pack.scored(), [1, 2, 5]);
    assert_eq!(pack.labels(), [12, 13, 22], "each label is the next token of the same conversation");
    assert_eq!((pack.scored_of(0), pack.scored_of(1)), (0..2, 2..3));
}

#[test]
fn a_position_without_a_next_token_has_no_label() {
    let pack = Pack::new([Sequence { input_ids: &[1, 2], positions: &[0, 1] }, Sequence { input_ids: &[3], positions: &[0] }]);
    assert_eq!((pack.scored(), pack.labels()), (&[0][..], &[2][..]), "never the next conversation's first token");
    let empty = Example { seq_id: 0, input_ids: vec![], scored: vec![] };
    assert!(empty.positions().is_empty());
    assert_eq!(Pack::new([]).segments(), [0]);
}

#[test]
fn a_plan_keeps_order_and_budget() {
    assert_eq!(plan([3, 4, 2, 9, 1], 7), [0..2, 2..3, 3..4, 4..5]);
    assert_eq!(plan([3, 4, 2, 9, 1], 100).as_slice(), std::slice::from_ref(&(0..5)));
    assert_eq!(plan([], 7), Vec::<std::ops::Range<usize>>::new());
    assert_eq!(plan([9, 9], 1), [0..1, 1..2], "a conversation is never cut");
}
