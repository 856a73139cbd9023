//! What a run's progress says beside tokens: how many positions are scored, what they take on disk, and whether the disk will do.

use crate::data::Example;
use potstill_cache::Written;
use std::time::Instant;

/// What is known of a run before it starts.
pub(super) struct Outlook {
    rows: u64,
    /// Scored positions of all rows.
    scored: u64,
    began: Instant,
    /// Scored positions sent to the writer in this run.
    sent: u64,
}

impl Outlook {
    pub(super) fn new(examples: &[Example]) -> Self {
        let scored = examples.iter().map(Example::scored_positions).sum();
        Self { rows: examples.len() as u64, scored, began: Instant::now(), sent: 0 }
    }

    /// Counts positions that were scored.
    pub(super) fn add(&mut self, scored: u64) {
        self.sent += scored;
    }

    /// Positions scored in this run.
    pub(super) fn scored_now(&self) -> u64 {
        self.sent
    }

    /// A remark for the progress: rows, scored positions a second, and from what is durable bytes a position, bytes to come and free.
    pub(super) fn remark(&self, row: u64, written: Written, free: Option<u64>) -> String {
        self.after(self.began.elapsed().as_secs_f64(), row, written, free)
    }

    fn after(&self, seconds: f64, row: u64, written: Written, free: Option<u64>) -> String {
        let mut parts = vec![format!("row {row} of {}", self.rows)];
        if self.sent > 0 && seconds > 0.0 {
            parts.push(format!("{:.0} scored/s", self.sent as f64 / seconds));
        }
        if written.scored > 0 {
            let each = written.bytes as f64 / written.scored as f64;
            let to_come = each * self.scored.saturating_sub(written.scored) as f64;
            parts.push(format!("{each:.1} B each"));
            parts.push(match free {
                // The manifest, and a shard that is joined from its pieces, want a little more.
                Some(free) if to_come * 1.05 > free as f64 => {
                    format!("THE DISK WILL NOT DO: {} to come, {} free", size(to_come), size(free as f64))
                }
                Some(free) => format!("{} to come, {} free", size(to_come), size(free as f64)),
                None => format!("{} to come", size(to_come)),
            });
        }
        parts.join(", ")
    }
}

/// Bytes in the largest unit that keeps a digit before the point.
fn size(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..units.len()).rev().find(|unit| bytes >= 1024f64.powi(*unit as i32)).unwrap_or(0);
    format!("{:.1} {}", bytes / 1024f64.powi(unit as i32), units[unit])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn outlook() -> Outlook {
        let example = Example { seq_id: 0, input_ids: vec![1; 101], scored: vec![true; 101] };
        let mut outlook = Outlook::new(&[example.clone(), example]);
        assert_eq!(outlook.scored, 200, "a first token has nothing before it");
        outlook.add(50);
        outlook
    }

    #[test]
    fn says_what_is_done_and_what_the_disk_needs() {
        let written = Written { rows: 1, scored: 100, bytes: 16_000 };
        let remark = |written, free| outlook().after(2.0, 1, written, free);
        assert_eq!(remark(Written::default(), Some(5)), "row 1 of 2, 25 scored/s");
        assert_eq!(remark(written, Some(2 << 30)), "row 1 of 2, 25 scored/s, 160.0 B each, 15.6 KiB to come, 2.0 GiB free");
        assert_eq!(remark(written, None), "row 1 of 2, 25 scored/s, 160.0 B each, 15.6 KiB to come");
        let full = remark(written, Some(16_500));
        assert!(full.ends_with("THE DISK WILL NOT DO: 15.6 KiB to come, 16.1 KiB free"), "{full}");
    }

    #[test]
    fn sizes_have_a_digit_before_the_point() {
        assert_eq!([0.0, 1023.0, 1024.0, 1.5e12].map(size), ["0.0 B", "1023.0 B", "1.0 KiB", "1.4 TiB"]);
    }
}
