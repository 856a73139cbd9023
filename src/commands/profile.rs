//! Where a GPU's time went during a command: a table on stderr, for whoever asks by the variable `POTSTILL_CUDA_PROFILE`.

use crate::print::{Side, Table};
use potstill_pipeline::device::{self, CUDA_PROFILE, KernelTime};
use std::io::Write;
use std::time::{Duration, Instant};

/// Does `work`, and says then how long the GPU took for what, if that was asked for.
pub fn profiled<T>(work: impl FnOnce() -> T) -> T {
    if std::env::var_os(CUDA_PROFILE).is_none_or(|value| value.is_empty() || value == "0") {
        return work();
    }
    device::begin_profile();
    let began = Instant::now();
    let done = work();
    let took = began.elapsed();
    let lines = match device::take_profile() {
        Err(error) => vec![format!("no profile of the GPU: {error}")],
        Ok(times) if times.is_empty() => vec!["no profile: nothing was launched on a GPU".into()],
        Ok(times) => lines(&times, took),
    };
    // A table that nobody can read is no reason to fail.
    let _ = lines.iter().try_for_each(|line| writeln!(std::io::stderr(), "{}", crate::text::visible(line)));
    done
}

fn lines(times: &[KernelTime], took: Duration) -> Vec<String> {
    let columns = [("on the GPU", Side::Left), ("launches", Side::Right), ("ms", Side::Right), ("share", Side::Right)];
    let mut table = Table::with_heads(&[&columns[..], &[("TFLOP/s", Side::Right)]].concat());
    let all: f64 = times.iter().map(|time| time.seconds).sum();
    // Copies may run beside kernels.
    let busy: f64 = times.iter().filter(|time| !time.name.starts_with("copy ")).map(|time| time.seconds).sum();
    for KernelTime { name, launches, seconds, operations } in times {
        let rate = if *operations > 0.0 { format!("{:.1}", operations / seconds.max(1e-9) / 1e12) } else { String::new() };
        let share = 100.0 * seconds / all.max(1e-9);
        table.row([name.to_string(), launches.to_string(), format!("{:.1}", seconds * 1e3), format!("{share:.1} %"), rate]);
    }
    let part = 100.0 * busy / took.as_secs_f64().max(1e-9);
    let mut lines = table.lines();
    lines.push(format!("kernels and products {busy:.2} of {:.2} s ({part:.1} %), loading included", took.as_secs_f64()));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_fits_a_terminal() {
        let time = |name, seconds, operations| KernelTime { name, launches: 123_456_789, seconds, operations };
        let times = [
            time("product with a weight", 1.5, 1.2e15),
            time("attention_backward_kv_bf16_128", 0.5, 0.0),
            time("copy to the GPU", 0.4, 0.0),
        ];
        let lines = lines(&times, Duration::from_secs(4));
        assert!(lines.iter().all(|line| line.len() <= 80), "{lines:#?}");
        assert!(lines[2].starts_with("product with a weight ") && lines[2].ends_with("1500.0  62.5 %    800.0"), "{lines:#?}");
        assert!(lines[3].contains("500.0  20.8 %"), "{lines:#?}");
        assert_eq!(lines[5], "kernels and products 2.00 of 4.00 s (50.0 %), loading included");
    }
}
