//! Waiting for another thread: spinning first, sleeping when it takes long.
//!
//! A gate counts its openings; one waits for an opening after those one has seen. Used by the
//! team ([`super::team`]) for the start and the end of steps and for barriers.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// Spins before it sleeps: some 30 to 90 microseconds, as processors pause differently. Longer
/// than phases differ between threads that all have a processor.
const SPINS: usize = 2000;

/// Something that opens again and again.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    openings: AtomicUsize,
    /// Threads that sleep or are about to.
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Gate {
    /// Openings so far.
    pub(crate) fn turn(&self) -> usize {
        self.openings.load(Ordering::Acquire)
    }

    /// Opens once more; what this thread wrote before is visible to those who waited.
    pub(crate) fn open(&self) {
        // Sequentially consistent, as the counting of sleepers: either a thread that goes to sleep
        // sees the opening, or it is seen here.
        self.openings.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    /// Waits until there were more openings than `seen`.
    pub(crate) fn wait(&self, seen: usize) {
        for _ in 0..SPINS {
            if self.turn() != seen {
                return;
            }
            spin_loop();
        }
        self.sleep(seen);
    }

    #[cold]
    fn sleep(&self, seen: usize) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.openings.load(Ordering::SeqCst) == seen {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_opening_is_seen_by_spinners_and_sleepers() {
        for delay in [0, 30] {
            let gate = Gate::default();
            std::thread::scope(|scope| {
                let waiters = [0, 1].map(|_| scope.spawn(|| gate.wait(0)));
                std::thread::sleep(Duration::from_millis(delay));
                assert!(delay == 0 || waiters.iter().all(|waiter| !waiter.is_finished()));
                gate.open();
            });
            assert_eq!(gate.turn(), 1);
            gate.wait(0);
        }
    }
}
