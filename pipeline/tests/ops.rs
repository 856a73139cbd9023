//! Every op's forward against a float64 twin written from its definition, and its backward against the twin's central differences.
//!
//! Tolerances: values of order 1, f32 arithmetic over rows of up to 24 elements or keys: a few times 2^-24 · 24 ≈ 1.5e-6 each way,
//! taken as 2e-5. The twin's differences with h = 1e-5 in f64 are good to about 1e-9.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::ops::rope::{Table, Turn};
use potstill_pipeline::ops::{attention, rms_norm, swiglu};
use support::floats;

const BOUND: f64 = 2e-5;

/// Values in ±1.3 that do not repeat soon.
fn values(n: usize, salt: usize) -> Vec<f64> {
    (0..n).map(|i| ((i * 7919 + salt * 104_729) % 1009) as f64 / 388.0 - 1.3).collect()
}

fn tensor(values: &[f64], shape: &[usize]) -> Tensor {
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    Tensor::from_vec(values, shape, &support::device()).unwrap()
}

fn close(ours: &Tensor, twin: &[f64], what: &str) {
    let ours = floats(ours);
    assert_eq!(ours.len(), twin.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(twin).enumerate() {
        assert!((f64::from(*a) - b).abs() < BOUND * b.abs().max(1.0), "{what} at {i}: {a} against {b}");
    }
}

/// d(Σ f(x)·g) / dx by central differences.
fn slopes(x: &[f64], g: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let h = 1e-5;
    let value = |x: &[f64]| f(x).iter().zip(g).map(|(y, g)| y * g).sum::<f64>();
    (0..x.len())
        .map(|i| {
            let (mut up, mut down) = (x.to_vec(), x.to_vec());
            up[i] += h;
            down[i] -= h;
            (value(&up) - value(&down)) / (2.0 * h)
        })
        .collect()
}

#[test]
fn rms_norm_and_its_backward() {
    let (t, h, eps) = (3, 10, 1e-3);
    let (x, w, g) = (values(t * h, 1), values(h, 2), values(t * h, 3));
    let twin = |x: &[f64]| -> Vec<f64> {
        x.chunks(h)
            .flat_map(|row| {
                let r = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / h as f64 + eps).sqrt();
                row.iter().zip(&w).map(move |(v, w)| v * r * w).collect::<Vec<_>>()
            })
            .collect()
    };
    let (xt, wt, gt) = (tensor(&x, &[t, h]), tensor(&w, &[h]), tensor(&g, &[t, h]));
    close(&rms_norm::forward(&xt, &wt, eps).unwrap(), &twin(&x), "forward");
    close(&rms_norm::backward(&xt, &wt, eps, &gt).unwrap(), &slopes(&x, &g, twin), "backward");
    rounded_at_once_or_later(&rms_norm::forward(&xt, &wt, eps).unwrap(), |precision| {
        rms_norm::forward_rounded(&xt, &wt, eps, precision)
    });
}

/// What products alone read is, or becomes when they read it, what they would make of all digits: the very same bits.
fn rounded_at_once_or_later(whole_tensor: &Tensor, for_products: impl Fn(Precision) -> candle_core::Result<Tensor>) {
    let on_host = |t: &Tensor| floats(&t.to_device(&Device::Cpu).unwrap());
    let whole = on_host(whole_tensor);
    assert_eq!(on_host(&for_products(Precision::F32).unwrap()), whole);
    // On a CPU whoever reads it rounds it.
    let dtype = if whole_tensor.device().is_cpu() { DType::F32 } else { DType::BF16 };
    assert_eq!(for_products(Precision::Bf16).unwrap().dtype(), dtype);
    let round = |values: Vec<f32>| values.into_iter().map(|v| bf16::from_f32(v).to_f32()).collect::<Vec<f32>>();
    assert_eq!(round(on_host(&for_products(Precision::Bf16).unwrap())), round(whole));
}

#[test]
fn swiglu_and_its_backward() {
    let n = 12;
    let (gate, up, g) = (values(n, 1), values(n, 2), values(n, 3));
    let f = |gate: &[f64], up: &[f64]| -> Vec<f64> { gate.iter().zip(up).map(|(a, b)| a / (1.0 + (-a).exp()) * b).collect() };
    let (a, b, gt) = (tensor(&gate, &[3, 4]), tensor(&up, &[3, 4]), tensor(&g, &[3, 4]));
    close(&swiglu::forward(&a, &b).unwrap(), &f(&gate, &up), "forward");
    rounded_at_once_or_later(&swiglu::forward(&a, &b).unwrap(), |precision| swiglu::forward_rounded(&a, &b, precision));
    let (da, db) = swiglu::backward(&a, &b, &gt).unwrap();
    close(&da, &slopes(&gate, &g, |x| f(x, &up)), "gate");
    close(&db, &slopes(&up, &g, |x| f(&gate, x)), "up");
    // Far out the gate saturates and nothing overflows.
    let far = tensor(&[-200.0, 200.0], &[1, 2]);
    assert!(floats(&swiglu::forward(&far, &far).unwrap()).iter().all(|v| v.is_finite()));
}

#[test]
fn rope_and_its_backward() {
    let (heads, d, theta, positions) = (2, 8, 100f64, [0u32, 1, 2, 0, 1, 700]);
    let n = positions.len() * heads * d;
    let (x, g) = (values(n, 1), values(n, 2));
    let twin = |x: &[f64]| -> Vec<f64> {
        let mut y = x.to_vec();
        for (t, p) in positions.iter().enumerate() {
            for h in 0..heads {
                let at = (t * heads + h) * d;
                for i in 0..d / 2 {
                    let angle = f64::from(*p) * theta.powf(-2.0 * i as f64 / d as f64);
                    let (a, b) = (x[at + i], x[at + i + d / 2]);
                    y[at + i] = a * angle.cos() - b * angle.sin();
                    y[at + i + d / 2] = b * angle.cos() + a * angle.sin();
                }
            }
        }
        y
    };
    let table = Table::new(&positions, d, theta, &support::device()).unwrap();
    let shape = [positions.len(), heads, d];
    // Position 700 times a frequency rounded to f32: an angle off by 700 · 2^-24 ≈ 4e-5 at most.
    let ours = floats(&table.apply(&tensor(&x, &shape), Turn::Forward).unwrap());
    assert!(ours.iter().zip(twin(&x)).all(|(a, b)| (f64::from(*a) - b).abs() < 2e-4));
    let back = floats(&table.apply(&tensor(&g, &shape), Turn::Backward).unwrap());
    assert!(back.iter().zip(slopes(&x, &g, twin)).all(|(a, b)| (f64::from(*a) - b).abs() < 2e-4));
    // Turning forward and back is the identity.
    let there = table.apply(&tensor(&x, &shape), Turn::Forward).unwrap();
    close(&table.apply(&there, Turn::Backward).unwrap(), &x, "there and back");
}

/// Attention from its definition: a full matrix, a mask, a softmax.
fn attention_twin(q: &[f64], k: &[f64], v: &[f64], segments: &[u32], heads: usize, kv_heads: usize, d: usize) -> Vec<f64> {
    let t = q.len() / heads / d;
    let segment = |i: usize| segments.iter().filter(|s| **s as usize <= i).count();
    let mut out = vec![0.0; q.len()];
    for h in 0..heads {
        let kv = h * kv_heads / heads;
        for i in 0..t {
            let visible: Vec<usize> = (0..t).filter(|j| *j <= i && segment(*j) == segment(i)).collect();
            let score = |j: usize| (0..d).map(|c| q[(i * heads + h) * d + c] * k[(j * kv_heads + kv) * d + c]).sum::<f64>();
            let weights: Vec<f64> = visible.iter().map(|j| (score(*j) / (d as f64).sqrt()).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (w, j) in weights.iter().zip(&visible) {
                for c in 0..d {
                    out[(i * heads + h) * d + c] += w / sum * v[(j * kv_heads + kv) * d + c];
                }
            }
        }
    }
    out
}

#[test]
fn attention_and_its_backward() {
    // Grouped and plain heads; segments of several lengths, an empty and a single one among them; d with and without a rest of 8.
    for (heads, kv_heads, d, segments) in [(4, 2, 8, vec![0u32, 3, 3, 4, 9]), (2, 2, 5, vec![0, 6]), (3, 1, 11, vec![0, 1, 7])] {
        let t = *segments.last().unwrap() as usize;
        let (nq, nk) = (t * heads * d, t * kv_heads * d);
        let (q, k, v, g) = (values(nq, 1), values(nk, 2), values(nk, 3), values(nq, 4));
        let f = |q: &[f64], k: &[f64], v: &[f64]| attention_twin(q, k, v, &segments, heads, kv_heads, d);
        let (qs, ks) = ([t, heads, d], [t, kv_heads, d]);
        let (qt, kt, vt, gt) = (tensor(&q, &qs), tensor(&k, &ks), tensor(&v, &ks), tensor(&g, &qs));
        let attended = attention::forward(&qt, &kt, &vt, &segments).unwrap();
        close(&attended.output, &f(&q, &k, &v), "forward");
        let (dq, dk, dv) = attention::backward(&qt, &kt, &vt, &attended, &gt, &segments).unwrap();
        close(&dq, &slopes(&q, &g, |x| f(x, &k, &v)), "dq");
        close(&dk, &slopes(&k, &g, |x| f(&q, x, &v)), "dk");
        close(&dv, &slopes(&v, &g, |x| f(&q, &k, x)), "dv");
    }
}

/// (dq, dk, dv) from the definition, in f64.
fn attention_backward_twin(
    (q, k, v, g): (&[f64], &[f64], &[f64], &[f64]),
    segments: &[u32],
    (heads, kv_heads, d): (usize, usize, usize),
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let scale = 1.0 / (d as f64).sqrt();
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for (h, ends) in (0..heads).flat_map(|h| segments.windows(2).map(move |ends| (h, ends))) {
        let kv = h * kv_heads / heads;
        for i in ends[0] as usize..ends[1] as usize {
            let (query, seen) = ((i * heads + h) * d, ends[0] as usize..=i);
            let dot = |a: &[f64], at: usize, b: &[f64], bt: usize| (0..d).map(|c| a[at + c] * b[bt + c]).sum::<f64>();
            let key = |j: usize| (j * kv_heads + kv) * d;
            let weights: Vec<f64> = seen.clone().map(|j| (dot(q, query, k, key(j)) * scale).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let dp: Vec<f64> = seen.clone().map(|j| dot(g, query, v, key(j))).collect();
            let delta: f64 = weights.iter().zip(&dp).map(|(w, dp)| w / sum * dp).sum();
            for ((w, dp), j) in weights.iter().zip(&dp).zip(seen) {
                let (p, ds) = (w / sum, w / sum * (dp - delta) * scale);
                for c in 0..d {
                    dq[query + c] += ds * k[key(j) + c];
                    dk[key(j) + c] += ds * q[query + c];
                    dv[key(j) + c] += p * g[query + c];
                }
            }
        }
    }
    (dq, dk, dv)
}

/// Conversations longer than a tile in both directions, heads wider than one and not a whole number of them; and a conversation alone has
/// the bits that it has among others.
#[test]
fn attention_in_many_tiles() {
    let segments = [0u32, 70, 70, 71, 103, 212];
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for (heads, kv_heads, d) in [(4, 2, 40), (2, 2, 64), (3, 1, 6)] {
        let t = 212;
        let (q, k, v) = (values(t * heads * d, 1), values(t * kv_heads * d, 2), values(t * kv_heads * d, 3));
        let (g, what) = (values(t * heads * d, 4), format!("{heads} heads of {d}"));
        let (qs, ks) = ([t, heads, d], [t, kv_heads, d]);
        let (qt, kt, vt, gt) = (tensor(&q, &qs), tensor(&k, &ks), tensor(&v, &ks), tensor(&g, &qs));
        let attended = attention::forward(&qt, &kt, &vt, &segments).unwrap();
        close(&attended.output, &attention_twin(&q, &k, &v, &segments, heads, kv_heads, d), &what);
        let ours = attention::backward(&qt, &kt, &vt, &attended, &gt, &segments).unwrap();
        let twins = attention_backward_twin((&q, &k, &v, &g), &segments, (heads, kv_heads, d));
        close(&ours.0, &twins.0, &format!("dq, {what}"));
        close(&ours.1, &twins.1, &format!("dk, {what}"));
        close(&ours.2, &twins.2, &format!("dv, {what}"));

        let alone = |x: &Tensor| x.narrow(0, 103, 109).unwrap().contiguous().unwrap();
        let (qa, ka, va, ga) = (alone(&qt), alone(&kt), alone(&vt), alone(&gt));
        let again = one_thread.install(|| {
            let attended = attention::forward(&qa, &ka, &va, &[0, 109]).unwrap();
            attention::backward(&qa, &ka, &va, &attended, &ga, &[0, 109]).unwrap()
        });
        for (among, alone_again) in [(&ours.0, &again.0), (&ours.1, &again.1), (&ours.2, &again.2)] {
            assert_eq!(floats(&alone(among)), floats(alone_again), "{what}");
        }
    }
}

/// A token that is not finite is seen by itself and by what comes after it in its conversation, by nothing else: 0 · NaN is NaN, so a
/// masked product must not be taken at all.
#[test]
fn attention_carries_what_is_not_finite_forward_only() {
    let (heads, kv_heads, d, t) = (2, 1, 8, 90);
    let segments = [0u32, 50, 90];
    let shape = [t, heads, d];
    let (q, k, v) = (values(t * heads * d, 1), values(t * kv_heads * d, 2), values(t * kv_heads * d, 3));
    let plain = |v: &[f64]| {
        let (k, v) = (tensor(&k, &[t, kv_heads, d]), tensor(v, &[t, kv_heads, d]));
        floats(&attention::forward(&tensor(&q, &shape), &k, &v, &segments).unwrap().output)
    };
    let sound = plain(&v);
    for at in [0, 13, 49, 50, 89] {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut spoilt = v.clone();
            spoilt[at * d + 3] = bad;
            let (begin, end) = if at < 50 { (0, 50) } else { (50, 90) };
            // On a GPU a tile of 64 rows of a conversation is not told apart: 0 · NaN is NaN there.
            let vague = if support::device().is_cuda() { at - (at - begin) % 64..at } else { at..at };
            for (i, (found, want)) in plain(&spoilt).iter().zip(&sound).enumerate() {
                let (token, dimension) = (i / (heads * d), i % d);
                if vague.contains(&token) && dimension == 3 {
                    continue;
                }
                if (at..end).contains(&token) && dimension == 3 {
                    assert!(!found.is_finite(), "{bad} at {at} is seen at {token}");
                } else {
                    assert!((found - want).abs() < 1e-6, "{bad} at {at}: {found} for {want} at {token}");
                }
            }
        }
    }
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let x = |shape: &[usize]| tensor(&values(shape.iter().product(), 1), shape);
    let (q, k) = (x(&[4, 3, 2]), x(&[4, 2, 2]));
    assert!(attention::forward(&q, &k, &k, &[0, 4]).unwrap_err().to_string().contains("do not fit"), "3 heads over 2");
    let q = x(&[4, 2, 2]);
    for segments in [&[0u32, 3][..], &[0, 5], &[1, 4], &[0, 3, 2, 4], &[]] {
        assert!(attention::forward(&q, &k, &k, segments).unwrap_err().to_string().contains("segments"), "{segments:?}");
    }
    // As many tokens as segments can say and five more, of one number: five tokens do not cover them.
    let many = x(&[1, 1, 1]).broadcast_as(((1usize << 32) + 5, 1, 1)).unwrap();
    let error = attention::forward(&many, &many, &many, &[0, 5]).unwrap_err().to_string();
    assert!(error.contains("do not cover 4294967301 tokens"), "{error}");
}
