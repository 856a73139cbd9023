//! Where a GPU's time goes, for whoever asks: an event before and after each launch and copy of ours, and sums by name. Refuses to print, to
//! end a run for a time's sake, and costs nothing while nobody asks.
//!
//! The events are the device's own clock. While the host is ahead of it, which is what it should be, a time is the launch's own; where the
//! device has nothing else to do, the way of the launch to it counts too.

use crate::device::KernelTime;
use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Events that tell the time.
const TELLS_TIME: Option<CUevent_flags> = Some(CUevent_flags::CU_EVENT_DEFAULT);
/// Launches whose events are kept before the older half of them is added up, so that the device is not waited for.
const MOST_PENDING: usize = 8192;

static ASKED: AtomicBool = AtomicBool::new(false);
static PROFILE: Mutex<Profile> = Mutex::new(Profile { pending: VecDeque::new(), sums: BTreeMap::new(), failed: None });

struct Profile {
    pending: VecDeque<Launch>,
    sums: BTreeMap<&'static str, KernelTime>,
    /// Why there is none.
    failed: Option<candle_core::Error>,
}

struct Launch {
    name: &'static str,
    operations: f64,
    begin: CudaEvent,
    end: CudaEvent,
}

impl Profile {
    /// Adds up the oldest `n`; waits for them.
    fn settle(&mut self, n: usize) -> Result<()> {
        for Launch { name, operations, begin, end } in self.pending.drain(..n) {
            let seconds = f64::from(begin.elapsed_ms(&end).w()?) / 1e3;
            let sum = self.sums.entry(name).or_insert(KernelTime { name, launches: 0, seconds: 0.0, operations: 0.0 });
            sum.launches += 1;
            sum.seconds += seconds;
            sum.operations += operations;
        }
        Ok(())
    }

    fn add(&mut self, launch: Launch) {
        self.pending.push_back(launch);
        if self.pending.len() >= MOST_PENDING
            && let Err(error) = self.settle(MOST_PENDING / 2)
        {
            ASKED.store(false, Ordering::Relaxed);
            self.pending.clear();
            self.failed = Some(error);
        }
    }
}

/// From now on launches are timed.
pub(crate) fn begin() {
    ASKED.store(true, Ordering::Relaxed);
}

/// What was launched until now, the longest first; nothing of it is counted again. Waits for the GPU. Error: its times cannot be had.
pub(crate) fn take() -> Result<Vec<KernelTime>> {
    let mut profile = PROFILE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = profile.failed.take() {
        return Err(error);
    }
    let all = profile.pending.len();
    profile.settle(all)?;
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
    PROFILE.lock().unwrap_or_else(PoisonError::into_inner).add(Launch { name, operations, begin, end });
    Ok(done)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::launch::overwrite;
    use super::super::{open, pinned};
    use super::*;
    use crate::data::pack::{Pack, Sequence};
    use crate::kernel::Precision;
    use crate::model::decoder::{Decoder, Holding};
    use crate::run::RunContext;
    use candle_core::Device;
    use std::path::Path;

    /// The only test that times: others run beside it, and may be counted too.
    #[test]
    fn launches_are_counted_by_name() {
        let Ok(device) = open(0) else { return };
        weights_are_unpacked_once_for_all_parts_of_the_rows(&device);
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

    /// Nothing else here computes with AWQ in f32.
    fn weights_are_unpacked_once_for_all_parts_of_the_rows(device: &Device) {
        let teacher = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/teacher-awq"));
        let context = RunContext::default();
        let mut decoder = Decoder::from_folder(teacher, Holding::AsStored, Precision::F32, device, &context).unwrap();
        decoder.place(&context).unwrap();
        decoder.layers.iter_mut().for_each(|layer| layer.mlp_rows = Some(2));
        begin();
        decoder.hidden(&Pack::new([Sequence { input_ids: &[1, 2, 3, 4, 5, 6, 7], positions: &[] }])).unwrap();
        ASKED.store(false, Ordering::Relaxed);
        let all = take().unwrap();
        let launches = |name: &str| all.iter().filter(|time| time.name == name).map(|time| time.launches).sum::<u64>();
        assert_eq!(launches("awq_unpack_f32"), 7 * decoder.layers.len() as u64);
        // Four parts of the rows: q, k, v, o, and four times gate, up, down.
        assert!(launches("product with a weight") >= (4 + 4 * 3) * decoder.layers.len() as u64);
    }
}
