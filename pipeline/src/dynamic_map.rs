//! bitsandbytes' dynamic 8-bit maps: 256 values whose steps grow with their magnitude. Both that the absolute maxima of NF4 blocks are kept
//! by, and the optimiser's state. Owns the values and what is nearest to them; refuses to know what is kept.
//!
//! ```text
//! decade i of 7, 10^(i-7) to 10^(i-6):   2^i steps (signed) or 2^(i+1) (unsigned), each entry the middle of its step
//! and beside these                       0 and 1;  signed also the negatives of the decades' entries
//! ```
//! Source: Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit optimizers via block-wise quantization" (2022), and the library's own maps,
//! which these equal bit for bit.

use std::sync::LazyLock;

/// Decades that a map reaches down.
const DECADES: i32 = 7;

/// Whether a map has negative entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// For values of either sign.
    Signed,
    /// For values from 0 up.
    Unsigned,
}

static SIGNED: LazyLock<Vec<f32>> = LazyLock::new(|| made(Sign::Signed));
static UNSIGNED: LazyLock<Vec<f32>> = LazyLock::new(|| made(Sign::Unsigned));

/// The 256 values of a map, rising.
pub fn values(sign: Sign) -> &'static [f32] {
    match sign {
        Sign::Signed => &SIGNED,
        Sign::Unsigned => &UNSIGNED,
    }
}

/// Middles between neighbours of rising values.
pub(crate) fn midpoints(values: &[f32]) -> Vec<f32> {
    values.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect()
}

/// How many midpoints lie strictly below `v`, which is the place of the nearest value: an exact midpoint goes to the lower one.
pub(crate) fn nearest(midpoints: &[f32], v: f32) -> u8 {
    midpoints.partition_point(|t| *t < v) as u8
}

fn made(sign: Sign) -> Vec<f32> {
    let mut map = vec![0f32, 1f32];
    for decade in 0..DECADES {
        let steps = 1usize << if sign == Sign::Signed { decade } else { decade + 1 };
        let power = 10f64.powi(decade - DECADES + 1) as f32;
        for i in 0..steps {
            let value = power * ((border(i, steps) + border(i + 1, steps)) / 2.0);
            map.push(value);
            if sign == Sign::Signed {
                map.push(-value);
            }
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// Border `i` of `steps` equal steps from 0.1 to 1 as torch's f32 linspace has it: from the start in the first half, from the end in the
/// second, one rounding each.
fn border(i: usize, steps: usize) -> f32 {
    let (start, end) = (0.1f32, 1f32);
    let step = (end - start) / steps as f32;
    match i < steps.div_ceil(2) {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((steps - i) as f32, end),
    }
}
