//! Where a GPU's time goes, for whoever asks: an event before and after each launch and copy, and sums by name. Refuses to print, and costs
//! nothing while nobody asks.
//!
//! The events are the device's own clock, so a launch's time is its own however far the host is ahead; of kernels that run at the same time
//! on two streams both count.

use crate::device::KernelTime;
use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Events that tell the time.
const TELLS_TIME: Option<CUevent_flags> = Some(CUevent_flags::CU_EVENT_DEFAULT);
/// Launches whose events are kept before they are added up.
const MOST_PENDING: usize = 4096;

static ASKED: AtomicBool = AtomicBool::new(false);
static PROFILE: Mutex<Profile> = Mutex::new(Profile { pending: Vec::new(), sums: BTreeMap::new() });

#[derive(Default)]
struct Profile {
    pending: Vec<Launch>,
    sums: BTreeMap<&'static str, KernelTime>,
}

struct Launch {
    name: &'static str,
    operations: f64,
    begin: CudaEvent,
    end: CudaEvent,
}

impl Profile {
    fn settle(&mut self) -> Result<()> {
        for Launch { name, operations, begin, end } in self.pending.drain(..) {
            let seconds = f64::from(begin.elapsed_ms(&end).w()?) / 1e3;
            let sum = self.sums.entry(name).or_insert(KernelTime { name, launches: 0, seconds: 0.0, operations: 0.0 });
            sum.launches += 1;
            sum.seconds += seconds;
            sum.operations += operations;
        }
        Ok(())
    }
}

/// From now on launches are timed.
pub(crate) fn begin() {
    ASKED.store(true, Ordering::Relaxed);
}

/// What was launched until now, the longest first; nothing of it is counted again. Waits for the GPU.
pub(crate) fn take() -> Result<Vec<KernelTime>> {
    let mut profile = PROFILE.lock().unwrap_or_else(PoisonError::into_inner);
    profile.settle()?;
    let mut all: Vec<KernelTime> = std::mem::take(&mut profile.sums).into_values().collect();
    all.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(all)
}

/// Launches, and counts the time under a name, with so many multiplications and additions.
pub(super) fn timed<T>(
    stream: &CudaStream,
    (name, operations): (&'static str, f64),
    launch: impl FnOnce() -> Result<T>,
) -> Result<T> {
    if !ASKED.load(Ordering::Relaxed) {
        return launch();
    }
    let begin = stream.record_event(TELLS_TIME).w()?;
    let done = launch()?;
    let end = stream.record_event(TELLS_TIME).w()?;
    let mut profile = PROFILE.lock().unwrap_or_else(PoisonError::into_inner);
    profile.pending.push(Launch { name, operations, begin, end });
    if profile.pending.len() >= MOST_PENDING {
        profile.settle()?;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::launch::overwrite;
    use super::super::{open, pinned};
    use super::*;

    /// The only test that times: others run beside it, and may be counted too.
    #[test]
    fn launches_are_counted_by_name() {
        let Ok(device) = open(0) else { return };
        let cuda = device.as_cuda_device().unwrap();
        let stream = cuda.cuda_stream();
        let tensor = pinned::send(&[0f32; 8], 8, cuda).unwrap();
        begin();
        for i in 0..3 {
            timed(&stream, ("a test's", 2.0), || overwrite(&tensor, &[i as f32; 8])).unwrap();
        }
        assert!(timed(&stream, ("a test's", 2.0), || overwrite(&tensor, &[1.0])).is_err());
        ASKED.store(false, Ordering::Relaxed);
        timed(&stream, ("a test's", 2.0), || overwrite(&tensor, &[5.0; 8])).unwrap();
        let all = take().unwrap();
        let ours = all.iter().find(|time| time.name == "a test's").unwrap();
        assert_eq!((ours.launches, ours.operations), (3, 6.0));
        assert!(ours.seconds >= 0.0 && all.is_sorted_by(|a, b| a.seconds >= b.seconds));
        assert!(!take().unwrap().iter().any(|time| time.name == "a test's"));
    }
}
