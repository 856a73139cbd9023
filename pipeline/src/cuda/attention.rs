//! Attention on the GPU; `ops/attention.rs` has the formulas and the CPU's definition, `kernels/attention.cu` the plan.
//!
//! bf16 factors go to tensor cores where a head has 64 or 128 dimensions; every other case is f32 on ordinary cores.

use super::launch::{Argument, Grid, device_of, floats, launch, place, room};
use super::pinned::send;
use crate::kernel::Precision;
use crate::ops::attention::{Segments, Shape};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

/// Rows of a tile.
const ROWS: u32 = 64;
/// Most dimensions of a head.
const MOST_DIMENSIONS: usize = 256;
/// Of the f32 kernels: floats of a tile's probabilities, and what a row in shared memory is padded by.
const WEIGHTS: usize = 64 * 36;
const PADDING: usize = 4;

/// One of the three kernels of a pass, and how its blocks are laid out.
struct Kernel {
    name: &'static str,
    threads: u32,
    shared: u32,
    /// Whether it wants the number of dimensions.
    any_width: bool,
}

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    BackwardQ,
    BackwardKv,
}

impl Kernel {
    fn new(pass: Pass, d: usize, precision: Precision) -> Result<Self> {
        if d > MOST_DIMENSIONS {
            bail!("attention: a head has {d} dimensions, the GPU's kernels take up to {MOST_DIMENSIONS}");
        }
        if precision == Precision::Bf16 && matches!(d, 64 | 128) {
            let tiles = if pass == Pass::Forward { 3 } else { 4 };
            let name = match (pass, d) {
                (Pass::Forward, 64) => "attention_forward_bf16_64",
                (Pass::Forward, _) => "attention_forward_bf16_128",
                (Pass::BackwardQ, 64) => "attention_backward_q_bf16_64",
                (Pass::BackwardQ, _) => "attention_backward_q_bf16_128",
                (Pass::BackwardKv, 64) => "attention_backward_kv_bf16_64",
                (Pass::BackwardKv, _) => "attention_backward_kv_bf16_128",
            };
            return Ok(Self { name, threads: 128, shared: (tiles * 64 * d * 2) as u32, any_width: false });
        }
        let (name, rows, weights) = match pass {
            Pass::Forward => ("attention_forward_f32", 128, 1),
            Pass::BackwardQ => ("attention_backward_q_f32", 192, 1),
            Pass::BackwardKv => ("attention_backward_kv_f32", 192, 2),
        };
        let width = d.next_power_of_two().max(64);
        let floats = rows * (width + PADDING) + weights * WEIGHTS;
        Ok(Self { name, threads: 256, shared: (4 * floats) as u32, any_width: true })
    }

    /// Runs it for tiles u32 [n, 3] and `heads` heads each.
    fn run(&self, device: &CudaDevice, tiles: &Tensor, heads: usize, places: &[Argument], shape: &Shape) -> Result<()> {
        let grid = Grid { blocks: (tiles.dim(0)? as u32, heads as u32), threads: self.threads, shared: self.shared };
        let sizes = [shape.tokens, shape.heads, shape.kv_heads].map(|size| Argument::Int(size as i32));
        let mut arguments = [places, &sizes].concat();
        if self.any_width {
            arguments.push(Argument::Int(shape.d as i32));
        }
        arguments.push(Argument::Float(shape.scale));
        // SAFETY: `Shape::of` compared the tensors, and tiles lie within the rows.
        unsafe { launch(device, self.name, grid, &arguments) }
    }
}

/// Tiles of 64 rows of each conversation of a pack, as (begin, end, first row): u32 [n, 3] each.
#[derive(Debug, Clone)]
pub(crate) struct Tiles {
    /// Those with the most keys before them first.
    of_queries: Tensor,
    /// Those with the most queries after them first.
    of_keys: Tensor,
}

impl Tiles {
    /// Of conversations between these bounds.
    pub(crate) fn new(segments: &[u32], device: &CudaDevice) -> Result<Self> {
        let pairs = segments.windows(2).map(|w| (w[0], w[1]));
        let all: Vec<[u32; 3]> =
            pairs.flat_map(|(begin, end)| (begin..end).step_by(ROWS as usize).map(move |first| [begin, end, first])).collect();
        let by = |work: fn(&[u32; 3]) -> u32| {
            let mut tiles = all.clone();
            tiles.sort_by_key(|tile| std::cmp::Reverse(work(tile)));
            send(&tiles.into_flattened(), (all.len(), 3), device)
        };
        Ok(Self { of_queries: by(|[begin, _, first]| first - begin)?, of_keys: by(|[_, end, first]| end - first)? })
    }
}

/// o as q [T, heads, d] and lse [heads · T] of q, k and v [T, kv_heads, d]; shapes and segments were checked.
pub(crate) fn forward(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    segments: &Segments,
    shape: Shape,
    precision: Precision,
) -> Result<(Tensor, Tensor)> {
    let device = device_of(q)?;
    let (o, lse) = (room(q.dims(), DType::F32, &device)?, room(shape.heads * shape.tokens, DType::F32, &device)?);
    if shape.tokens > 0 {
        let tiles = &segments.tiles(&device)?.of_queries;
        let places = [floats(q)?, floats(k)?, floats(v)?, place(tiles, DType::U32)?, floats(&o)?, floats(&lse)?];
        Kernel::new(Pass::Forward, shape.d, precision)?.run(&device, tiles, shape.heads, &places, &shape)?;
    }
    Ok((o, lse))
}

/// (dQ, dK, dV), shaped as q, k and v, from what [`forward`] was given and gave, and dL/do.
pub(crate) fn backward(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (o, lse): (&Tensor, &Tensor),
    dy: &Tensor,
    segments: &Segments,
    (shape, precision): (Shape, Precision),
) -> Result<(Tensor, Tensor, Tensor)> {
    let device = device_of(q)?;
    let new = |like: &Tensor| room(like.dims(), DType::F32, &device);
    let (dq, dk, dv, delta) = (new(q)?, new(k)?, new(v)?, new(lse)?);
    if shape.tokens == 0 {
        return Ok((dq, dk, dv));
    }
    let sizes = [shape.tokens, shape.heads, shape.d].map(|size| Argument::Int(size as i32));
    let arguments = [&[floats(o)?, floats(dy)?, floats(&delta)?][..], &sizes].concat();
    // SAFETY: o and dy are [T, heads, d], delta [heads · T]; a warp a token and head, eight of them a block.
    unsafe { launch(&device, "attention_delta", Grid::blocks((shape.tokens * shape.heads).div_ceil(8)), &arguments) }?;
    let Tiles { of_queries, of_keys } = segments.tiles(&device)?;
    let given = [floats(q)?, floats(k)?, floats(v)?, floats(dy)?, floats(lse)?, floats(&delta)?];
    let places = [&given[..], &[place(of_queries, DType::U32)?, floats(&dq)?]].concat();
    Kernel::new(Pass::BackwardQ, shape.d, precision)?.run(&device, of_queries, shape.heads, &places, &shape)?;
    let places = [&given[..], &[place(of_keys, DType::U32)?, floats(&dk)?, floats(&dv)?]].concat();
    Kernel::new(Pass::BackwardKv, shape.d, precision)?.run(&device, of_keys, shape.kv_heads, &places, &shape)?;
    Ok((dq, dk, dv))
}
