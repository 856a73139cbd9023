//! Owns when a request may be sent: a limit of requests a minute, what a server asked for, and pauses that grow. All threads share it,
//! so that one 429 slows all of them down. Refuses to oversleep a request to stop.

use crate::run::RunContext;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longest nap in which a stop goes unnoticed.
const NAP: Duration = Duration::from_millis(50);
/// Longest pause of our own between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Longest pause that a server can ask for.
const LONGEST_ASKED: Duration = Duration::from_secs(600);

/// The next moment at which anybody may send.
#[derive(Debug)]
pub(super) struct Pace {
    next: Mutex<Instant>,
    interval: Duration,
}

/// Whether a wait ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waited {
    Out,
    Stopped,
}

impl Pace {
    /// At most `per_minute` requests a minute, evenly; as many as there are threads where `None`.
    pub(super) fn new(per_minute: Option<u32>) -> Self {
        let interval = per_minute.map_or(Duration::ZERO, |n| Duration::from_secs(60) / n.max(1));
        Self { next: Mutex::new(Instant::now()), interval }
    }

    /// Waits until the caller may send.
    pub(super) fn turn(&self, context: &RunContext) -> Waited {
        let at = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let at = (*next).max(Instant::now());
            *next = at + self.interval;
            at
        };
        rest_until(at, context)
    }

    /// Lets nobody send before `pause` is over.
    pub(super) fn hold(&self, pause: Duration) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = (*next).max(Instant::now() + pause);
    }
}

/// Waits, unless a stop is asked for.
pub(super) fn rest(pause: Duration, context: &RunContext) -> Waited {
    rest_until(Instant::now() + pause, context)
}

fn rest_until(end: Instant, context: &RunContext) -> Waited {
    loop {
        if context.stopping() {
            return Waited::Stopped;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Waited::Out;
        }
        std::thread::sleep(NAP.min(left));
    }
}

/// The pause after the `tries`-th failure (from 1) of the request with this digest: `first`, doubled each time, at most 30 s, and of that a
/// part between one half and all, so that requests that failed together are not repeated together.
pub(super) fn pause(first: Duration, tries: u32, digest: &[u8; 32]) -> Duration {
    let full = first.saturating_mul(2_u32.saturating_pow(tries.saturating_sub(1))).min(LONGEST_PAUSE);
    let byte = digest.get(tries as usize % digest.len()).copied().unwrap_or(0);
    full.mul_f64(0.5 + 0.5 * f64::from(byte) / 255.0)
}

/// What `Retry-After` asks for: seconds, or a date of HTTP (`Sun, 06 Nov 1994 08:49:37 GMT`); at most ten minutes.
pub(super) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let pause = match value.parse::<f64>() {
        Ok(seconds) if seconds.is_finite() && seconds >= 0.0 => Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_ASKED),
        Ok(_) => return None,
        Err(_) => date(value)?.duration_since(now).unwrap_or(Duration::ZERO),
    };
    Some(pause.min(LONGEST_ASKED))
}

/// A date as HTTP servers write it today (RFC 9110, IMF-fixdate).
fn date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split(' ').collect();
    let [_, day, month, year, time, "GMT"] = words.as_slice() else { return None };
    let month = MONTHS.iter().position(|name| name == month)? as u64 + 1;
    let (day, year): (u64, u64) = (day.parse().ok()?, year.parse().ok()?);
    let clock: Vec<u64> = time.split(':').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let [hour, minute, second] = clock.as_slice() else { return None };
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || *hour > 23 || *minute > 59 || *second > 60 {
        return None;
    }
    // Days since 1970, years beginning in March so that a leap day is the last one.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    let days = days.checked_sub(719_468)?;
    Some(UNIX_EPOCH + Duration::from_secs(days * 86_400 + hour * 3600 + minute * 60 + second))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn dates_and_seconds() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(at(784_111_777)));
        assert_eq!(date("Thu, 29 Feb 2024 23:59:59 GMT"), Some(at(1_709_251_199)));
        assert_eq!(date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(at(0)));
        let now = at(784_111_700);
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(Duration::from_secs(77)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:00:00 GMT", now), Some(Duration::ZERO));
        assert_eq!(retry_after(" 1.5 ", now), Some(Duration::from_millis(1500)));
        assert_eq!(retry_after("1e300", now), Some(LONGEST_ASKED));
        for none in [
            "",
            "soon",
            "-1",
            "NaN",
            "inf",
            "Sun, 06 Nov 1994 08:49 GMT",
            "Sun, 06 Xyz 1994 08:49:37 GMT",
            "a, 99 Nov 1 1:1:1 GMT",
        ] {
            assert_eq!(retry_after(none, now), None, "{none}");
        }
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        let digests = [[0_u8; 32], [255; 32]];
        let of = |tries, digest: &[u8; 32]| pause(Duration::from_secs(1), tries, digest).as_secs_f64();
        assert_eq!([1, 2, 3, 16, u32::MAX].map(|tries| of(tries, &digests[0])), [0.5, 1.0, 2.0, 15.0, 15.0]);
        assert_eq!([1, 2, 3, 16, u32::MAX].map(|tries| of(tries, &digests[1])), [1.0, 2.0, 4.0, 30.0, 30.0]);
    }

    #[test]
    fn turns_are_spread_and_held_for_all() {
        let pace = Pace::new(Some(6000));
        let context = RunContext::default();
        let began = Instant::now();
        for _ in 0..4 {
            assert_eq!(pace.turn(&context), Waited::Out);
        }
        // Three intervals of 10 ms after the first turn; a slow machine only makes it longer.
        assert!(began.elapsed() >= Duration::from_millis(30));
        pace.hold(Duration::from_millis(40));
        let held = Instant::now();
        assert_eq!(pace.turn(&context), Waited::Out);
        assert!(held.elapsed() >= Duration::from_millis(39));
        // A stop ends even the longest wait.
        pace.hold(LONGEST_ASKED);
        context.stop.store(true, Ordering::Relaxed);
        assert_eq!(pace.turn(&context), Waited::Stopped);
    }
}
