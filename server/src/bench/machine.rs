//! What the machine says of itself: its processor, its free memory, who uses it, the date.
//!
//! Linux tells by `/proc`; elsewhere the answers are "unknown". Not here: its speeds
//! ([`kernels::devices`]).

use super::stats::Foreign;
use std::time::{SystemTime, UNIX_EPOCH};

/// Readings of the system's books, in ticks since it started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CpuTime {
    /// All processors, working or not.
    all: u64,
    /// All processors, working.
    busy: u64,
    /// This process.
    own: u64,
}

impl CpuTime {
    /// Now; none where the system does not tell.
    pub(crate) fn now() -> Option<Self> {
        let read = |path| std::fs::read_to_string(path).ok();
        Self::parse(&read("/proc/stat")?, &read("/proc/self/stat")?)
    }

    fn parse(machine: &str, process: &str) -> Option<Self> {
        let line = machine.lines().find_map(|line| line.strip_prefix("cpu "))?;
        // user nice system idle iowait irq softirq steal; guests are part of user.
        let ticks: Option<Vec<u64>> =
            line.split_whitespace().take(8).map(|t| t.parse().ok()).collect();
        let ticks = ticks.filter(|ticks| ticks.len() >= 5)?;
        let all = ticks.iter().sum::<u64>();
        let busy = all - ticks[3] - ticks[4];
        // The name in brackets may hold spaces. utime and stime are fields 14 and 15 of all.
        let fields: Vec<&str> = process.rsplit_once(')')?.1.split_whitespace().collect();
        let [user, system] = [11, 12].map(|i| fields.get(i).and_then(|f| f.parse::<u64>().ok()));
        Some(Self { all, busy, own: user? + system? })
    }

    /// What others used from `earlier` to now.
    fn since(self, earlier: Self) -> Foreign {
        let busy = self.busy.saturating_sub(earlier.busy);
        let own = self.own.saturating_sub(earlier.own);
        let others = busy.saturating_sub(own);
        Foreign { others, all: self.all.saturating_sub(earlier.all) }
    }
}

/// Runs `work` and says what others used of the machine meanwhile; none where unknown.
pub(crate) fn listen<T>(work: impl FnOnce() -> T) -> (T, Option<Foreign>) {
    let before = CpuTime::now();
    let result = work();
    let foreign = before.and_then(|before| Some(CpuTime::now()?.since(before)));
    (result, foreign)
}

/// The processor's name.
pub(crate) fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| format!("unknown {}", std::env::consts::ARCH), |(_, n)| n.trim().to_owned())
}

/// Bytes that can be taken without swapping; none where unknown.
pub(crate) fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The date and time in UTC: `2025-01-31T12:00:00Z`.
pub(crate) fn utc_now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    utc(now.map_or(0, |since| since.as_secs()))
}

/// Seconds since 1970 as a date, by counting years of 365.2425 days that begin in March.
fn utc(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    // 719468 days lie between the first of March of year 0 and 1970.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn books_are_read() {
        let machine = "cpu  100 5 50 800 40 3 2 10 7 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        let process = "42 (a (b) c) S 1 42 42 0 -1 4194304 90 0 0 0 61 9 0 0 20 0 3 0 1 1 1";
        let first = CpuTime::parse(machine, process).unwrap();
        assert_eq!((first.all, first.busy, first.own), (1010, 170, 70));
        let later = CpuTime { all: 1110, busy: 230, own: 110 };
        assert_eq!(later.since(first), Foreign { others: 20, all: 100 });
        assert_eq!(first.since(later), Foreign { others: 0, all: 0 }, "no wrap around");
        assert!(CpuTime::parse("intr 5", process).is_none());
        assert!(CpuTime::parse(machine, "42 (a) S 1").is_none());
    }

    #[test]
    fn our_own_work_is_not_foreign() {
        let Some(before) = CpuTime::now() else {
            println!("skipped: this system has no /proc");
            return;
        };
        // Spins for ten ticks of its own, which may take a while on a busy machine.
        let start = std::time::Instant::now();
        let mut after = before;
        while after.own < before.own + 10 && start.elapsed().as_secs() < 60 {
            (0..100_000).for_each(|_| std::hint::spin_loop());
            after = CpuTime::now().unwrap();
        }
        let (own, busy) = (after.own - before.own, after.busy - before.busy);
        assert!(own >= 10, "{before:?} {after:?}");
        // What we used is part of what the machine used, but for the ticks of both clocks.
        assert!(busy + 3 >= own, "{before:?} {after:?}");
        assert!(after.since(before).others <= busy.saturating_sub(own), "{before:?} {after:?}");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_868_799), "2000-02-29T23:59:59Z");
        assert_eq!(utc(1_735_689_600), "2025-01-01T00:00:00Z");
        assert_eq!(utc(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
