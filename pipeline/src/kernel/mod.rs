//! The innermost loops of the CPU path: tiles of products and the layouts they read. Refuses to know models, weights and tensors.
//!
//! The one idea: every value is a sum in one fixed order, whatever the processor. A tile adds `a[k] · b[k]` for rising k with one fused
//! multiply-add each, so AVX-512, AVX2 and plain code give the same bits in f32, and a row's bits do not depend on the rows beside it.
//!
//! ```text
//! rows [T, K]  ─►  blocks of 12 rows, k by k        columns of W  ─►  panels of 32 columns, k by k
//!                  a[k·12 + r]                                        b[k·32 + c]
//!                            └── tile [12, 32] = Σ_k a[k·12 + r] · b[k·32 + c] ──┘
//! ```
//! In bf16 a word holds two neighbours, k even in the low half; a step adds both products. The processor's instruction for it rounds
//! in its own way; a processor without it multiplies the rounded values as f32. So bf16 bits are those of the processor's kind, f32
//! bits those of any.

mod rows;
mod tile;
mod transpose;
mod vectors;

pub use rows::{Block, Rows, add_row, pair_panel, panels, round_all, round_to_pairs};
pub use transpose::transpose;
pub(crate) use vectors::vectorised;

use serde::{Deserialize, Serialize};
use std::sync::OnceLock;

/// Rows of a tile.
pub const TILE_ROWS: usize = 12;
/// Columns of a tile and of a panel.
pub const TILE_COLUMNS: usize = 32;

/// What the factors of a product are rounded to; sums are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// Not at all.
    #[default]
    F32,
    /// bfloat16, to nearest even.
    Bf16,
}

impl Precision {
    /// Bytes of a factor.
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

/// A set of instructions this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Isa {
    /// The best this processor has.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::all().pop().unwrap_or(Self(Level::Plain)))
    }

    /// All that this processor has, slowest first.
    pub fn all() -> Vec<Self> {
        let levels = vec![Level::Plain];
        #[cfg(target_arch = "x86_64")]
        let levels = {
            let (mut levels, mut has) = (levels, true);
            for (level, there) in [
                (Level::Avx2, is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")),
                (Level::Avx512, is_x86_feature_detected!("avx512f")),
                (Level::Avx512Bf16, is_x86_feature_detected!("avx512bf16")),
            ] {
                has &= there;
                if has {
                    levels.push(level);
                }
            }
            levels
        };
        levels.into_iter().map(Self).collect()
    }

    /// Whether it has an instruction for pairs of bf16. Without one, values rounded to bf16 are multiplied as f32, at the speed of f32.
    pub fn multiplies_pairs(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Level::Avx512Bf16;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Its name, as people know it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Plain => "plain",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => "AVX-512 BF16",
        }
    }
}

/// Length of a layout of `steps` times `width` values, `step` apart. Too many to count are more than any slice holds, not fewer.
fn extent(steps: usize, step: usize, width: usize) -> usize {
    match steps.checked_sub(1) {
        None => 0,
        Some(before) => before.saturating_mul(step).saturating_add(width),
    }
}

#[cfg(target_arch = "x86_64")]
impl Isa {
    pub(crate) fn has_avx2(self) -> bool {
        self.0 >= Level::Avx2
    }

    pub(crate) fn has_avx512(self) -> bool {
        self.0 >= Level::Avx512
    }
}
