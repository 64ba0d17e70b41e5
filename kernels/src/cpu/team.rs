//! A team of threads that walk the same list of phases together, with a barrier between phases.
//!
//! The caller is a member; the others live as long as the team. Whoever waits, for a step or at a
//! barrier, spins for some microseconds (waking a thread takes longer than most phases) and then
//! sleeps: a thread that is missing may need the very processor that the waiting one holds. Small
//! work is split by member index, large work is claimed part by part. A step allocates nothing.
//! Not here: phases.

use super::gate::Gate;
use crate::Error;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A member takes this part of its even share of what is left.
const PARTS: usize = 2;

/// Threads that wait for each other.
#[derive(Debug)]
pub(crate) struct Team {
    crew: Arc<Crew>,
    /// Held while a step runs: runners that share a team take turns.
    turn: Mutex<()>,
    threads: Vec<JoinHandle<()>>,
}

/// What the caller and the threads of a team share.
#[derive(Debug)]
struct Crew {
    count: usize,
    /// Opens when there is work.
    start: Gate,
    work: Mutex<Option<Work>>,
    barrier: Barrier,
    /// Threads that are through with the work.
    done: AtomicUsize,
    /// Opens when all are.
    finish: Gate,
    closed: AtomicBool,
}

/// The work of a step, whose lifetime [`Team::run`] keeps.
#[derive(Clone, Copy)]
struct Work(*const (dyn Fn(&Member<'_>) + Sync));

// SAFETY: what it points to is Sync, and `Team::run` keeps it alive until all threads are done.
unsafe impl Send for Work {}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Work")
    }
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
        let count = threads.max(1);
        let crew = Arc::new(Crew::new(count));
        let mut team = Self { crew, turn: Mutex::new(()), threads: vec![] };
        for index in 1..count {
            let crew = Arc::clone(&team.crew);
            let thread = std::thread::Builder::new().name(format!("kernel-{index}"));
            let thread = thread.spawn(move || crew.serve(index)).map_err(|e| Error::Device {
                device: "cpu".to_owned(),
                reason: format!("no {threads} threads: {e}"),
            })?;
            team.threads.push(thread);
        }
        Ok(team)
    }

    /// Number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.crew.count
    }

    /// Runs `work` on every thread at once and returns when all are done.
    ///
    /// If one panics, the others leave their next barrier by panicking too, and so does the
    /// caller. A team of one is the caller itself: nobody has to wake up.
    pub(crate) fn run(&self, work: impl Fn(&Member<'_>) + Sync) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let crew = &*self.crew;
        let erased: &(dyn Fn(&Member<'_>) + Sync) = &work;
        // SAFETY: only the lifetime changes. The threads call it between `start` and `finish`, and
        // this function does not return or unwind before `finish`, so `work` outlives the calls.
        let erased: &'static (dyn Fn(&Member<'_>) + Sync) = unsafe { std::mem::transmute(erased) };
        *crew.work.lock().unwrap_or_else(PoisonError::into_inner) = Some(Work(erased));
        let finished = crew.finish.turn();
        crew.start.open();
        let mine = catch_unwind(AssertUnwindSafe(|| work(&crew.member(0))));
        if mine.is_err() {
            crew.barrier.break_up();
        }
        if crew.count > 1 {
            crew.finish.wait(finished);
        }
        let broken = crew.barrier.reset();
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(!broken, "a thread of the team panicked");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.crew.closed.store(true, Ordering::Release);
        self.crew.start.open();
        for thread in self.threads.drain(..) {
            // A thread catches what its work does, so it has nothing to report.
            drop(thread.join());
        }
    }
}

impl Crew {
    fn new(count: usize) -> Self {
        Self {
            count,
            start: Gate::default(),
            work: Mutex::new(None),
            barrier: Barrier::new(count),
            done: AtomicUsize::new(0),
            finish: Gate::default(),
            closed: AtomicBool::new(false),
        }
    }

    fn member(&self, index: usize) -> Member<'_> {
        Member { index, count: self.count, barrier: &self.barrier }
    }

    /// What a thread does: all work there ever is.
    fn serve(&self, index: usize) {
        let mut turn = 0;
        loop {
            self.start.wait(turn);
            turn += 1;
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            let work = *self.work.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: `Team::run` keeps the work alive until this thread has counted itself done.
            let work = work.map(|Work(work)| unsafe { &*work });
            let result = catch_unwind(AssertUnwindSafe(|| {
                if let Some(work) = work {
                    work(&self.member(index));
                }
            }));
            if result.is_err() {
                self.barrier.break_up();
            }
            if self.done.fetch_add(1, Ordering::AcqRel) + 2 == self.count {
                self.done.store(0, Ordering::Relaxed);
                self.finish.open();
            }
        }
    }
}

impl Member<'_> {
    /// This thread's contiguous share of `items`.
    pub(crate) fn share(&self, items: usize) -> Range<usize> {
        items * self.index / self.count..items * (self.index + 1) / self.count
    }

    /// Takes parts of `items` that no other member has taken until all are gone: a thread that is
    /// slow, or has to wait for a processor, leaves more to the others. Parts are multiples of
    /// `least` and shrink as less is left, so that all end nearly together; `claimed` is zero
    /// before the first member comes.
    pub(crate) fn claim(
        &self,
        items: usize,
        least: usize,
        claimed: &AtomicUsize,
        mut work: impl FnMut(Range<usize>),
    ) {
        let end = |start: usize| {
            let part = (items - start.min(items)) / (self.count * PARTS);
            let part = if self.count == 1 { items } else { part.next_multiple_of(least) };
            items.min(start + part.max(least))
        };
        let next = |start: usize| (start < items).then(|| end(start));
        while let Ok(start) = claimed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            work(start..end(start));
        }
    }

    /// Its place among the threads of the team.
    pub(crate) fn index(&self) -> usize {
        self.index
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

/// A place where all members wait for the last one.
#[derive(Debug)]
struct Barrier {
    count: usize,
    arrived: AtomicUsize,
    round: Gate,
    broken: AtomicBool,
}

impl Barrier {
    fn new(count: usize) -> Self {
        let (arrived, broken) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { count, arrived, round: Gate::default(), broken }
    }

    fn wait(&self) {
        if self.count == 1 {
            return;
        }
        // Looked up in this order: who finds the barrier whole sees it opened when it breaks.
        let round = self.round.turn();
        self.assert_whole();
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.count {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.open();
        } else {
            self.round.wait(round);
        }
        self.assert_whole();
    }

    fn assert_whole(&self) {
        assert!(!self.broken.load(Ordering::Acquire), "another thread of the team panicked");
    }

    /// Sends away all who wait or will come.
    fn break_up(&self) {
        self.broken.store(true, Ordering::Release);
        self.round.open();
    }

    /// Makes it whole again once nobody is in the work; says whether it was broken.
    fn reset(&self) -> bool {
        self.arrived.store(0, Ordering::Relaxed);
        self.broken.swap(false, Ordering::AcqRel)
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
    fn sleepers_wake_up() {
        let team = Team::new(3).unwrap();
        for slow in 0..3 {
            let arrived = AtomicUsize::new(0);
            team.run(|member| {
                if member.index == slow {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                arrived.fetch_add(1, Ordering::Relaxed);
                member.wait();
                assert_eq!(arrived.load(Ordering::Relaxed), 3);
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
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
