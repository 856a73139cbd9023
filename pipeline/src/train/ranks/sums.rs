//! Sums over all ranks: of a step's losses, and of its gradients. The order is that of the ranks, and rank 0 alone adds, so all ranks go on
//! with the very same bits.
//!
//! Gradients go through in stretches, a few of them under way at once; no rank holds another's gradients as a whole.

use super::error::RankError;
use super::link::Link;
use super::message::{CHUNK, Message, Part};
use crate::Result;
use crate::ops::with_f32;
use candle_core::{Device, Tensor};

/// Stretches that a rank is ahead with of the sums that it got; less than a link's inbox holds.
const AHEAD: usize = 4;

/// Sums of the parts in the order of the ranks; `None` where any was given up. Errors: a rank that is at another step or at other rows.
pub(super) fn of_parts(own: Part, links: &[Link]) -> Result<Option<[f64; 3]>> {
    let mut sums = own.sums;
    for link in links {
        let part = link.part()?;
        let (ours, theirs) = ([own.step, own.scored, own.tokens], [part.step, part.scored, part.tokens]);
        if ours != theirs {
            let names = ["step", "scored positions", "tokens"];
            let different = names.iter().zip(ours.iter().zip(&theirs)).filter(|(_, (ours, theirs))| ours != theirs);
            let differences = different.map(|(name, (ours, theirs))| format!("{name}: rank 0 has {ours}, it has {theirs}"));
            return Err(RankError::Other { rank: link.rank(), differences: differences.collect::<Vec<_>>().join("; ") }.into());
        }
        sums = sums.zip(part.sums).map(|(a, b)| std::array::from_fn(|i| a[i] + b[i]));
    }
    links.iter().try_for_each(|link| link.send(&Message::Sums(sums)))?;
    Ok(sums)
}

/// The gradients of rank 0, to which those of the others are added; all get the sums.
pub(super) fn add_up(gradients: &mut [Tensor], links: &[Link]) -> Result<()> {
    for gradient in gradients {
        let mut values = with_f32(&on_the_host(gradient)?, |values| Ok(values.to_vec()))?;
        for stretch in values.chunks_mut(CHUNK) {
            for link in links {
                let theirs = link.values(stretch.len())?;
                stretch.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
            }
            let sums = Message::Values(stretch.to_vec());
            links.iter().try_for_each(|link| link.send(&sums))?;
        }
        *gradient = Tensor::from_vec(values, gradient.dims(), gradient.device())?;
    }
    Ok(())
}

/// Gives rank 0 these gradients, and puts the sums in their place.
pub(super) fn hand_in(gradients: &mut [Tensor], link: &Link) -> Result<()> {
    let of_tensor = |(tensor, gradient): (usize, &Tensor)| {
        let count = gradient.elem_count();
        (0..count).step_by(CHUNK).map(move |first| (tensor, first..count.min(first + CHUNK)))
    };
    let stretches: Vec<_> = gradients.iter().enumerate().flat_map(of_tensor).collect();
    let (mut sending, mut sums) = (None, Vec::new());
    for i in 0..stretches.len() + AHEAD {
        if let Some((tensor, range)) = stretches.get(i) {
            // A tensor's values are fetched once, whatever device they are on.
            if sending.as_ref().is_none_or(|(of, _)| of != tensor) {
                sending = Some((*tensor, on_the_host(&gradients[*tensor])?));
            }
            if let Some((_, values)) = &sending {
                link.send(&with_f32(values, |values| Ok(Message::Values(values[range.clone()].to_vec())))?)?;
            }
        }
        if let Some((tensor, range)) = i.checked_sub(AHEAD).and_then(|behind| stretches.get(behind)) {
            sums.extend(link.values(range.len())?);
            let gradient = &mut gradients[*tensor];
            if range.end == gradient.elem_count() {
                *gradient = Tensor::from_vec(std::mem::take(&mut sums), gradient.dims(), gradient.device())?;
            }
        }
    }
    Ok(())
}

/// The tensor in memory, row by row; without a copy where it is so already.
pub(super) fn on_the_host(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_device(&Device::Cpu)?.contiguous()?)
}

/// BLAKE3 of these tensors' values and of the number of updates.
pub(in crate::train) fn digest(parameters: &[(String, Tensor)], updates: u64) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&updates.to_le_bytes());
    let mut bytes = Vec::with_capacity(4 * CHUNK);
    for (_, tensor) in parameters {
        with_f32(&on_the_host(tensor)?, |values| {
            for stretch in values.chunks(CHUNK) {
                bytes.clear();
                bytes.extend(stretch.iter().flat_map(|value| value.to_le_bytes()));
                hasher.update(&bytes);
            }
            Ok(())
        })?;
    }
    Ok(*hasher.finalize().as_bytes())
}
