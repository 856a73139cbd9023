//! Tests of a row as people and machines see it.
#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use potstill_cache::SoftTargets;

fn example() -> Conversation {
    let mut targets = SoftTargets::default();
    targets.push(&[2, 7], &[0.5f32.ln(), 0.25f32.ln()], 0.25f32.ln());
    targets.push(&[9, 8], &[0.75f32.ln(), 0.125f32.ln()], 0.125f32.ln());
    let record = Record { seq_id: 4, input_ids: vec![1, 2, 3, 5], positions: vec![0, 2], targets, codec: Default::default() };
    Conversation::of(6, &record, |id| if id == 3 { "\u{1b}[31m 中".into() } else { format!(" t{id}").into_bytes() })
}

#[test]
fn entry_i_stands_beside_token_i_and_speaks_of_the_next() {
    let row = example();
    assert_eq!(row.positions.iter().map(|p| p.scored).collect::<Vec<_>>(), [true, false, true, false]);
    let first = row.positions[0].after.as_ref().expect("scored");
    // f32 logarithms are off by up to half a unit in the last place: 3e-8 of the probability.
    assert!(first.next_id == 2 && first.next_probability.is_some_and(|p| (p - 0.5).abs() < 1e-7), "{first:?}");
    assert!((first.tail_probability - 0.25).abs() < 1e-7, "{first:?}");
    let third = row.positions[2].after.as_ref().expect("scored");
    assert_eq!((third.next_id, third.next_logprob, third.kept[0].id), (5, None, 9));
    assert!((row.mean_kept_loss.expect("one was kept") - std::f64::consts::LN_2).abs() < 1e-6);
    assert_eq!((row.row, row.seq_id, row.tokens, row.scored), (6, 4, 4, 2));
}

#[test]
fn what_people_see_fits_and_cannot_act_on_the_terminal() {
    let mut shown = Vec::new();
    example().write(5, Ink::Plain, &mut shown).expect("memory");
    let shown = String::from_utf8(shown).expect("UTF-8");
    assert!(shown.chars().all(|c| c == '\n' || !c.is_control()), "{shown}");
    assert!(shown.lines().all(|line| text::width(line) <= COLUMNS), "{shown}");
    assert!(shown.contains("▸␣t2 50.0%  ␣t7 25.0%") && shown.contains("in tail"), "{shown}");
    assert!(shown.contains("\\u{1b}[31m␣中"), "{shown}");
}

#[test]
fn long_lists_of_alternatives_wrap() {
    let mut targets = SoftTargets::default();
    let ids: Vec<u32> = (10..74).collect();
    targets.push(&ids, &[(1.0f32 / 128.0).ln(); 64], 0.5f32.ln());
    let record = Record { seq_id: 0, input_ids: vec![1, 2], positions: vec![0], targets, codec: Default::default() };
    let mut shown = Vec::new();
    Conversation::of(0, &record, |id| format!(" quite a long token {id}").into_bytes())
        .write(64, Ink::Plain, &mut shown)
        .expect("memory");
    let shown = String::from_utf8(shown).expect("UTF-8");
    assert!(shown.lines().all(|line| text::width(line) <= COLUMNS), "{shown}");
    assert_eq!(shown.matches("0.8%").count(), 64);
}

#[test]
fn drawn_tokens_show_count_and_estimate() {
    let mut targets = SoftTargets::default();
    let (sample_ids, sample_counts) = (&[3, 8][..], &[10, 30][..]);
    targets.push_target(&Target { sample_ids, sample_counts, tail_logprob: 0.125f32.ln(), ..Target::default() });
    targets.push_target(&Target { sample_ids: &[3], sample_counts: &[40], tail_logprob: 0.5f32.ln(), ..Target::default() });
    let record = Record { seq_id: 0, input_ids: vec![1, 3, 9], positions: vec![0, 1], targets, codec: Default::default() };
    let row = Conversation::of(0, &record, |id| format!("t{id}").into_bytes());
    let first = row.positions[0].after.as_ref().expect("scored");
    assert_eq!((first.next_probability, first.next_estimate, first.drawn[0].count), (None, Some(0.25), 30));
    assert_eq!(row.mean_kept_loss, None);
    let mut shown = Vec::new();
    row.write(5, Ink::Plain, &mut shown).expect("memory");
    let shown = String::from_utf8(shown).expect("UTF-8");
    assert!(shown.contains("drawn next") && shown.contains("t8 ×30 ~75.0%  ▸t3 ×10 ~25.0%"), "{shown}");
    assert!(shown.contains(" ~25.0%   12.50%") && shown.contains("undrawn   50.00%"), "{shown}");
    assert!(shown.contains("t3 ×40 ~100.0%"), "{shown}");

    // Beside a head they share the tail: a half, of which t3 has a quarter.
    let mut targets = SoftTargets::default();
    let (ids, logprobs) = (&[7][..], &[0.5f32.ln()][..]);
    targets.push_target(&Target { ids, logprobs, tail_logprob: 0.5f32.ln(), sample_ids, sample_counts, ..Target::default() });
    let record = Record { seq_id: 0, input_ids: vec![1, 3], positions: vec![0], targets, codec: Default::default() };
    let mut shown = Vec::new();
    Conversation::of(0, &record, |id| format!("t{id}").into_bytes()).write(5, Ink::Plain, &mut shown).expect("memory");
    let shown = String::from_utf8(shown).expect("UTF-8");
    let words = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("most likely next") && words.contains("t7 50.0% t8 ×30 ~37.5% ▸t3 ×10 ~12.5%"), "{shown}");
}
