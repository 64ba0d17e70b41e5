//! Runners that count and time their steps; the engine itself knows no clock.
//!
//! Input: the verifier's runner and the draft's, in one engine for one sequence at a time. Not
//! here: what the times mean ([`super::tally`]).

use kernels::backend::RunnerMemory;
use kernels::program::{SlotId, TokenId};
use kernels::{Error, Runner, StepInput, StepOutput};
use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Steps of a runner.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Steps {
    /// Inside all of them.
    pub(super) time: Duration,
    /// How many there were of each number of rows.
    pub(super) by_rows: BTreeMap<usize, usize>,
}

impl Steps {
    fn add(&mut self, rows: usize, time: Duration) {
        self.time += time;
        *self.by_rows.entry(rows).or_default() += 1;
    }
}

impl AddAssign<&Self> for Steps {
    fn add_assign(&mut self, more: &Self) {
        self.time += more.time;
        for (&rows, steps) in &more.by_rows {
            *self.by_rows.entry(rows).or_default() += steps;
        }
    }
}

/// Steps of both runners.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Lap {
    pub(super) verifier: Steps,
    pub(super) draft: Steps,
    /// Steps of the draft right after one of the verifier: cycles in which the draft model worked.
    pub(super) starts: usize,
}

impl AddAssign<&Self> for Lap {
    fn add_assign(&mut self, more: &Self) {
        self.verifier += &more.verifier;
        self.draft += &more.draft;
        self.starts += more.starts;
    }
}

/// Which runner of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Verifier,
    Draft,
}

/// The steps since they were last taken, and whose the last one was.
#[derive(Debug, Default)]
struct Book {
    lap: Lap,
    last: Option<Role>,
}

/// The clock of an engine's runners, for whoever does not hold them.
#[derive(Debug, Clone, Default)]
pub(super) struct Clock(Arc<Mutex<Book>>);

impl Clock {
    /// The steps since the last call.
    pub(super) fn take(&self) -> Lap {
        self.with(|book| std::mem::take(&mut book.lap))
    }

    /// A runner with this clock.
    pub(super) fn around(&self, inner: Box<dyn Runner>, role: Role) -> Box<dyn Runner> {
        Box::new(Clocked { inner, role, clock: self.clone() })
    }

    /// Adds a wait for steps that were added before.
    fn wait(&self, role: Role, time: Duration) {
        self.with(|Book { lap, .. }| match role {
            Role::Verifier => lap.verifier.time += time,
            Role::Draft => lap.draft.time += time,
        });
    }

    fn add(&self, role: Role, rows: usize, time: Duration) {
        self.with(|Book { lap, last }| {
            match role {
                Role::Verifier => lap.verifier.add(rows, time),
                Role::Draft => {
                    lap.draft.add(rows, time);
                    lap.starts += usize::from(*last != Some(Role::Draft));
                }
            }
            *last = Some(role);
        });
    }

    fn with<T>(&self, change: impl FnOnce(&mut Book) -> T) -> T {
        // What is guarded is counters, whole at any time.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A runner with a clock.
struct Clocked {
    inner: Box<dyn Runner>,
    role: Role,
    clock: Clock,
}

impl Runner for Clocked {
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
        let start = Instant::now();
        self.inner.step(input, output)?;
        self.clock.add(self.role, input.tokens.len(), start.elapsed());
        Ok(())
    }

    /// Its time is what asking takes; that of the step itself is in [`Runner::answers`].
    fn ask(&mut self, input: &StepInput<'_>, follows: bool) -> Result<bool, Error> {
        let start = Instant::now();
        let is_asked = self.inner.ask(input, follows)?;
        if is_asked {
            self.clock.add(self.role, input.tokens.len(), start.elapsed());
        }
        Ok(is_asked)
    }

    fn answers(&mut self, out: &mut Vec<Option<TokenId>>) -> Result<(), Error> {
        let start = Instant::now();
        self.inner.answers(out)?;
        self.clock.wait(self.role, start.elapsed());
        Ok(())
    }

    fn read_slot(&mut self, slot: SlotId, out: &mut Vec<f32>) -> Result<(), Error> {
        self.inner.read_slot(slot, out)
    }

    fn memory(&self) -> RunnerMemory {
        self.inner.memory()
    }

    fn poison(&mut self, live: &[usize]) {
        self.inner.poison(live);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::BlockTables;
    use kernels::program::BlockId;

    const MS: Duration = Duration::from_millis(1);

    /// Chooses a token for each step asked for, and takes its time.
    struct Asked {
        is_offered: bool,
        steps: usize,
    }

    impl Runner for Asked {
        fn step(&mut self, _: &StepInput<'_>, _: &mut StepOutput) -> Result<(), Error> {
            Ok(())
        }

        fn ask(&mut self, _: &StepInput<'_>, follows: bool) -> Result<bool, Error> {
            std::thread::sleep(MS);
            self.steps = if follows { self.steps + 1 } else { 1 };
            Ok(self.is_offered)
        }

        fn answers(&mut self, out: &mut Vec<Option<TokenId>>) -> Result<(), Error> {
            std::thread::sleep(10 * MS);
            out.resize(self.steps, Some(TokenId(5)));
            Ok(())
        }

        fn read_slot(&mut self, _: SlotId, _: &mut Vec<f32>) -> Result<(), Error> {
            Ok(())
        }

        fn memory(&self) -> RunnerMemory {
            RunnerMemory::default()
        }

        fn poison(&mut self, _: &[usize]) {}
    }

    /// Asks for three steps and their answers: what the clock says, and the answers.
    fn chain(is_offered: bool) -> (Lap, Vec<Option<TokenId>>) {
        let (clock, mut out) = (Clock::default(), vec![]);
        let mut runner = clock.around(Box::new(Asked { is_offered, steps: 0 }), Role::Draft);
        let input = StepInput {
            tokens: &[TokenId(1)],
            positions: &[0],
            rope_lens: &[1],
            query_ends: &[1],
            context_lens: &[1],
            block_tables: BlockTables { blocks: &[BlockId(0)], ends: &[1] },
            output_rows: &[0],
            draws: &[Some(kernels::Draw::GREEDY)],
        };
        let asked: Vec<bool> = (0..3).map(|k| runner.ask(&input, k > 0).unwrap()).collect();
        assert_eq!(asked, [is_offered; 3]);
        if is_offered {
            runner.answers(&mut out).unwrap();
        }
        (clock.take(), out)
    }

    #[test]
    fn steps_that_follow_each_other_are_timed_with_their_answers() {
        let (lap, out) = chain(true);
        assert_eq!(out, [Some(TokenId(5)); 3]);
        assert_eq!((lap.draft.by_rows, lap.starts), (BTreeMap::from([(1, 3)]), 1));
        assert!(lap.draft.time >= 13 * MS, "{:?}", lap.draft.time);
        assert_eq!(lap.verifier, Steps::default());
        assert_eq!(chain(false), (Lap::default(), vec![]), "what is not offered did not happen");
    }

    #[test]
    fn a_lap_knows_whose_steps_they_were() {
        let (clock, ms) = (Clock::default(), Duration::from_millis);
        clock.add(Role::Verifier, 9, ms(50));
        clock.take();
        for (role, rows, time) in [
            (Role::Draft, 2, 3),
            (Role::Draft, 1, 2),
            (Role::Verifier, 3, 20),
            (Role::Verifier, 1, 10),
            (Role::Draft, 1, 2),
        ] {
            clock.add(role, rows, ms(time));
        }
        let mut lap = clock.take();
        let steps = |time, by_rows: &[(usize, usize)]| Steps {
            time: ms(time),
            by_rows: by_rows.iter().copied().collect(),
        };
        let expected = Lap {
            verifier: steps(30, &[(1, 1), (3, 1)]),
            draft: steps(7, &[(1, 2), (2, 1)]),
            starts: 2,
        };
        assert_eq!(lap, expected);
        assert_eq!(clock.take(), Lap::default(), "taken is taken");
        lap += &expected;
        let twice = (steps(60, &[(1, 2), (3, 2)]), steps(14, &[(1, 4), (2, 2)]), 4);
        assert_eq!((lap.verifier, lap.draft, lap.starts), twice);
    }
}
