//! A team of threads that walk the same list of phases together, with a barrier between phases.
//!
//! One wake-up a step (a rayon broadcast), then spinning barriers: a fork and join per phase would
//! cost more than small phases do. Small work is split by member index, large work is claimed part
//! by part. Not here: phases.

use crate::Error;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Spins this often before it lets other threads run: machines may have fewer free processors
/// than the team has threads.
const SPINS: usize = 2000;

/// Parts that each member gets of shared work if all are equally fast.
const PARTS: usize = 6;

/// Threads that wait for each other.
#[derive(Debug)]
pub(crate) struct Team {
    pool: rayon::ThreadPool,
    threads: usize,
}

/// One thread's place in its team during a step.
#[derive(Debug)]
pub(crate) struct Member<'a> {
    index: usize,
    count: usize,
    barrier: &'a Barrier,
}

impl Team {
    /// A team of `threads` (at least one).
    ///
    /// # Errors
    /// [`Error::Device`] if the system gives no threads.
    pub(crate) fn new(threads: usize) -> Result<Self, Error> {
        let threads = threads.max(1);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("kernel-{i}"))
            .build()
            .map_err(|e| Error::Device {
                device: "cpu".to_owned(),
                reason: format!("no {threads} threads: {e}"),
            })?;
        Ok(Self { pool, threads })
    }

    /// Number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// The pool, for work outside steps.
    pub(crate) fn pool(&self) -> &rayon::ThreadPool {
        &self.pool
    }

    /// Runs `work` on every thread at once and returns when all are done.
    ///
    /// If one panics, the others leave their next barrier by panicking too, and so does the
    /// caller. A team of one is the caller itself: nobody has to wake up.
    pub(crate) fn run(&self, work: impl Fn(&Member<'_>) + Sync) {
        let barrier = Barrier::new(self.threads);
        if self.threads == 1 {
            return work(&Member { index: 0, count: 1, barrier: &barrier });
        }
        self.pool.broadcast(|context| {
            let _alarm = Alarm(&barrier);
            work(&Member { index: context.index(), count: self.threads, barrier: &barrier });
        });
    }
}

impl Member<'_> {
    /// This thread's contiguous share of `items`.
    pub(crate) fn share(&self, items: usize) -> Range<usize> {
        items * self.index / self.count..items * (self.index + 1) / self.count
    }

    /// Takes parts of `items` that no other member has taken until all are gone: a thread that is
    /// slow, or has to wait for a processor, leaves more to the others. Parts are multiples of
    /// `least`; `claimed` is zero before the first member comes.
    pub(crate) fn claim(
        &self,
        items: usize,
        least: usize,
        claimed: &AtomicUsize,
        mut work: impl FnMut(Range<usize>),
    ) {
        let part = (items / (self.count * PARTS)).next_multiple_of(least).max(least);
        let part = if self.count == 1 { items.max(1) } else { part };
        loop {
            let start = claimed.fetch_add(part, Ordering::Relaxed);
            if start >= items {
                return;
            }
            work(start..items.min(start + part));
        }
    }

    /// Threads of the team.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Waits until all members have come here: what they wrote before is visible after.
    pub(crate) fn wait(&self) {
        self.barrier.wait();
    }
}

/// A barrier that spins.
#[derive(Debug)]
struct Barrier {
    count: usize,
    arrived: AtomicUsize,
    round: AtomicUsize,
    broken: AtomicBool,
}

impl Barrier {
    fn new(count: usize) -> Self {
        let zero = AtomicUsize::default;
        Self { count, arrived: zero(), round: zero(), broken: AtomicBool::new(false) }
    }

    fn wait(&self) {
        if self.count == 1 {
            return;
        }
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.count {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while self.round.load(Ordering::Acquire) == round {
            assert!(!self.broken.load(Ordering::Relaxed), "another thread of the team panicked");
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

/// Breaks the barrier when its thread panics, so that no other waits for it for ever.
struct Alarm<'a>(&'a Barrier);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.broken.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once() {
        let team = Team::new(3).unwrap();
        for items in [0, 1, 2, 3, 10, 64] {
            let claimed = AtomicUsize::new(0);
            let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            team.run(|member| {
                let count = |range: Range<usize>| {
                    for i in range {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    }
                };
                count(member.share(items));
                member.claim(items, 4, &claimed, count);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 2));
        }
    }

    #[test]
    fn a_barrier_separates_phases() {
        let team = Team::new(4).unwrap();
        let arrived = AtomicUsize::new(0);
        team.run(|member| {
            for phase in 0..200 {
                arrived.fetch_add(1, Ordering::Relaxed);
                member.wait();
                assert_eq!(arrived.load(Ordering::Relaxed), 4 * (phase + 1));
                member.wait();
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_nobody_hangs() {
        let team = Team::new(3).unwrap();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            team.run(|member| {
                assert!(member.index != 1, "on purpose");
                member.wait();
            });
        }));
        assert!(result.is_err());
        team.run(|member| member.wait());
    }
}
