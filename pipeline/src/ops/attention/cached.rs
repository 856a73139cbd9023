//! Attention of new rows over keys and values that are kept from earlier calls. Forward only.
//!
//! ```text
//! conversation a: past 3 rows, 1 new    keys  a a a│a      the new row sees all of them
//! conversation b: past 0 rows, 3 new    keys  │b b b       a conversation's first rows: as in a pack
//! ```
//! A row's score with each key is one sum over d, its output one sum over keys, both in the order of `forward.rs`: a conversation in
//! pieces gives the very bits of the whole one. A single row uses one lane in 32 of a tile there, so here lanes are keys, then dimensions.

use super::forward::attend;
use super::{Attended, Shape, pairs};
use crate::kernel::{Isa, TILE_COLUMNS, vectorised};
use crate::ops::exponential::exp;
use crate::ops::floats;
use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;
use std::cell::RefCell;

/// Keys and values of a conversation so far, in one layer, f32.
#[derive(Debug, Clone)]
pub struct KeysValues {
    heads: Vec<HeadRows>,
    d: usize,
    rows: usize,
}

/// Of one key/value head.
#[derive(Debug, Clone, Default)]
struct HeadRows {
    /// Panels of 32 keys: [panel][d][32].
    keys: Vec<f32>,
    /// [key][d in whole panels of 32].
    values: Vec<f32>,
}

impl KeysValues {
    /// None yet; room for `capacity` rows is asked for at once, and taken as they come.
    pub fn new(kv_heads: usize, d: usize, capacity: usize) -> Self {
        let rows = capacity.next_multiple_of(TILE_COLUMNS);
        let head = || HeadRows {
            keys: Vec::with_capacity(rows * d),
            values: Vec::with_capacity(rows * d.next_multiple_of(TILE_COLUMNS)),
        };
        Self { heads: (0..kv_heads).map(|_| head()).collect(), d, rows: 0 }
    }

    /// Rows so far.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Bytes that a row takes.
    pub fn row_bytes(kv_heads: usize, d: usize) -> usize {
        4 * kv_heads * (d + d.next_multiple_of(TILE_COLUMNS))
    }

    /// Appends rows `begin..end` of k and v [T, kv_heads, d].
    fn append(&mut self, k: &[f32], v: &[f32], (begin, end): (usize, usize)) {
        let (d, step, rows) = (self.d, self.heads.len() * self.d, self.rows);
        let padded = d.next_multiple_of(TILE_COLUMNS);
        for (kv, head) in self.heads.iter_mut().enumerate() {
            for (i, at) in (begin..end).map(|row| row * step + kv * d).enumerate() {
                let lane = (rows + i) % TILE_COLUMNS;
                if lane == 0 {
                    head.keys.resize(head.keys.len() + d * TILE_COLUMNS, 0.0);
                }
                let panel = (rows + i) / TILE_COLUMNS * d * TILE_COLUMNS;
                let lanes = head.keys[panel..].iter_mut().skip(lane).step_by(TILE_COLUMNS);
                lanes.zip(&k[at..at + d]).for_each(|(key, k)| *key = *k);
                head.values.extend_from_slice(&v[at..at + d]);
                head.values.resize(head.values.len() + padded - d, 0.0);
            }
        }
        self.rows += end - begin;
    }
}

/// o [T, heads, d] of the new rows q [T, heads, d], k and v [T, kv_heads, d]; `segments` are cumulative lengths from 0 to T, one a
/// conversation, whose earlier rows are in `past`; the new ones are appended there.
pub fn forward_cached(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[u32], past: &mut [&mut KeysValues]) -> Result<Attended> {
    if !q.device().is_cpu() {
        // Kept rows lie in the host's memory.
        let host = |t: &Tensor| t.to_device(&Device::Cpu);
        let attended = forward_cached(&host(q)?, &host(k)?, &host(v)?, segments, past)?;
        return Ok(Attended { output: attended.output.to_device(q.device())?, lse: None });
    }
    let shape = Shape::of(q, k, v, segments)?;
    let fits = |kept: &&mut KeysValues| kept.heads.len() == shape.kv_heads && kept.d == shape.d;
    if past.len() + 1 != segments.len() || !past.iter().all(fits) {
        bail!(
            "attention: {} conversations' kept keys and values do not fit k {:?} in {} segments",
            past.len(),
            k.dims(),
            segments.len() - 1
        );
    }
    let (mut o, mut lse) = (vec![0f32; shape.tokens * shape.heads * shape.d], vec![0f32; shape.tokens * shape.heads]);
    let (qs, ks, vs) = (floats(q)?, floats(k)?, floats(v)?);
    let begins = |rows: &[&mut KeysValues], i: usize, (begin, end): (usize, usize)| rows[i].is_empty() && end - begin > 1;
    let first: Vec<(usize, usize)> =
        pairs(segments).enumerate().filter(|(i, segment)| begins(past, *i, *segment)).map(|(_, segment)| segment).collect();
    attend((&qs, &ks, &vs), &first, shape, (&mut o, &mut lse));
    // What each new row sees, in the rows' order: none where a whole conversation was computed above.
    let mut seen: Vec<Option<(usize, usize)>> = Vec::with_capacity(shape.tokens);
    for (i, segment) in pairs(segments).enumerate() {
        let (whole, rows) = (begins(past, i, segment), past[i].rows);
        seen.extend((segment.0..segment.1).map(|row| (!whole).then_some((i, rows + row - segment.0 + 1))));
        past[i].append(&ks, &vs, segment);
    }
    let past: Vec<&KeysValues> = past.iter().map(|kept| &**kept).collect();
    let group = shape.heads / shape.kv_heads;
    o.par_chunks_mut(group * shape.d).zip(qs.par_chunks(group * shape.d)).enumerate().for_each(|(i, (o, q))| {
        let (row, kv) = (i / shape.kv_heads, i % shape.kv_heads);
        if let Some((conversation, keys)) = seen[row] {
            SCORES.with_borrow_mut(|scores| attend_row(q, &past[conversation].heads[kv], keys, shape, o, scores));
        }
    });
    Ok(Attended { output: Tensor::from_vec(o, q.dims(), q.device())?, lse: None })
}

thread_local! {
    static SCORES: RefCell<Vec<f32>> = RefCell::default();
}

/// One row of the heads that share keys and values: o and q [group · d], over the first `keys` keys.
fn attend_row(q: &[f32], head: &HeadRows, keys: usize, shape: Shape, o: &mut [f32], scores: &mut Vec<f32>) {
    let (isa, d) = (Isa::best(), shape.d);
    let padded = d.next_multiple_of(TILE_COLUMNS);
    let mut panel = [0f32; TILE_COLUMNS];
    for (q, o) in q.chunks_exact(d).zip(o.chunks_exact_mut(d)) {
        scores.resize(keys.next_multiple_of(TILE_COLUMNS), 0.0);
        for (keys, scores) in head.keys.chunks_exact(d * TILE_COLUMNS).zip(scores.chunks_exact_mut(TILE_COLUMNS)) {
            isa.row(d, q, (keys, TILE_COLUMNS), scores);
        }
        let sum = soften(&mut scores[..keys], shape.scale);
        for (first, o) in (0..d).step_by(TILE_COLUMNS).zip(o.chunks_mut(TILE_COLUMNS)) {
            isa.row(keys, scores, (&head.values[first..], padded), &mut panel);
            o.iter_mut().zip(&panel).for_each(|(o, weighed)| *o = weighed / sum);
        }
    }
}

vectorised! {
    /// Turns scores into exp(s·scale − max·scale); their sum, in order.
    fn soften(scores: &mut [f32], scale: f32) -> f32 {
        let mut largest = f32::NEG_INFINITY;
        for score in scores.iter() {
            largest = if *score > largest { *score } else { largest };
        }
        for score in scores.iter_mut() {
            *score = exp((*score - largest) * scale);
        }
        let mut sum = 0.0;
        for score in scores.iter() {
            sum += *score;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::ops::attention::forward;
    use candle_core::Device;

    /// Some values between −2 and 2, [rows, heads, d].
    fn some(rows: usize, heads: usize, d: usize, seed: usize) -> Tensor {
        let value = |i: usize| ((i * 7919 + seed * 104_729) % 4001) as f32 / 1000.0 - 2.0;
        Tensor::from_vec((0..rows * heads * d).map(value).collect::<Vec<f32>>(), (rows, heads, d), &Device::Cpu).unwrap()
    }

    /// Two conversations of 75 and 40 rows, the one of which comes in these pieces and the other in those, both at the same times.
    fn check((heads, kv_heads, d): (usize, usize, usize), pieces: [&[usize]; 2]) {
        let lengths = pieces.map(|pieces| pieces.iter().sum::<usize>());
        let rows = lengths[0] + lengths[1];
        let (q, k, v) = (some(rows, heads, d, 1), some(rows, kv_heads, d, 2), some(rows, kv_heads, d, 3));
        let whole = forward(&q, &k, &v, &[0, lengths[0] as u32, rows as u32]).unwrap().output;
        let mut past = [KeysValues::new(kv_heads, d, 8), KeysValues::new(kv_heads, d, 100)];
        let mut done = [0, 0];
        for step in 0..pieces[0].len().max(pieces[1].len()) {
            let new = [0, 1].map(|i| pieces[i].get(step).copied().unwrap_or(0));
            let taken = |x: &Tensor| {
                let parts = [0, 1].map(|i| x.narrow(0, i * lengths[0] + done[i], new[i]).unwrap());
                Tensor::cat(&parts, 0).unwrap().contiguous().unwrap()
            };
            let segments = [0, new[0] as u32, (new[0] + new[1]) as u32];
            let [a, b] = &mut past;
            let found = forward_cached(&taken(&q), &taken(&k), &taken(&v), &segments, &mut [a, b]).unwrap().output;
            let bits = |x: &Tensor| -> Vec<u32> {
                x.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
            };
            assert_eq!(bits(&found), bits(&taken(&whole)), "heads {heads}/{kv_heads}, d {d}, step {step}");
            done = [done[0] + new[0], done[1] + new[1]];
            assert_eq!([past[0].len(), past[1].len()], done);
        }
    }

    #[test]
    fn a_conversation_in_pieces_gives_the_bits_of_the_whole_one() {
        let ones = [1; 40];
        let mut long = vec![33, 1, 1, 1];
        long.extend([1; 30]);
        long.extend([5, 4]);
        for sizes in [(4, 4, 32), (6, 2, 64), (4, 1, 16), (2, 2, 80)] {
            check(sizes, [&long, &ones]);
            check(sizes, [&[75], &[0, 40]]);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (q, k) = (some(3, 4, 32, 1), some(3, 2, 32, 2));
        let refused = |past: &mut [&mut KeysValues]| forward_cached(&q, &k, &k, &[0, 3], past).unwrap_err().to_string();
        assert!(refused(&mut []).contains("0 conversations"));
        assert!(refused(&mut [&mut KeysValues::new(4, 32, 0)]).contains("do not fit"));
    }
}
