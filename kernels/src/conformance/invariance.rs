//! A row's bits depend on its own sequence alone: not on the rows beside it, not on how its
//! sequence was cut into steps, not on memory that is no longer or not yet in use.

use super::case::Case;
use super::session::{Rows, Schedule, run};
use super::{Tested, bounds, cases, cpus, cuda, decoder, reference};
use crate::cuda::CudaBackend;
use emulator::Options;

/// Bits, so that equal means equal even for NaN and zeros of either sign.
fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|value| value.to_bits()).collect()
}

/// Every row of `some` is the same in `all`.
fn same(tested: &Tested, case: &Case, all: &Rows, some: &Rows, what: &str) {
    for (place, row) in some {
        let (sequence, position) = *place;
        let wanted = bits(&all[place]);
        assert!(
            bits(row) == wanted,
            "{} on {}: sequence {sequence} position {position} differs {what}",
            case.name,
            tested.name
        );
    }
}

fn check(tested: &Tested, case: &Case) {
    let backend = tested.backend.as_ref();
    let whole = run(backend, case, Schedule::Whole, false);
    assert_eq!(whole.len(), case.tokens());
    let alone = run(backend, case, Schedule::Alone, false);
    assert_eq!(alone.len(), case.tokens());
    same(tested, case, &whole, &alone, "when computed alone");
    for seed in 1..4 {
        let mixed = run(backend, case, Schedule::Mixed(seed), false);
        same(tested, case, &whole, &mixed, &format!("in mixed steps of seed {seed}"));
    }
    let poisoned = run(backend, case, Schedule::Mixed(4), true);
    same(tested, case, &whole, &poisoned, "with poisoned memory");
    let poisoned = run(backend, case, Schedule::Whole, true);
    same(tested, case, &whole, &poisoned, "in one step with poisoned memory");
    assert!(whole.values().flatten().all(|value| value.is_finite()), "{}", case.name);
}

/// The variants of the CPU must agree (see the test below), so one stands for all here.
#[test]
fn rows_do_not_depend_on_the_schedule() {
    let one_of_each = [reference()].into_iter().chain(cpus().pop());
    for tested in one_of_each.chain(cuda(Options::default())) {
        cases::all().iter().chain(&decoder::decoders()).for_each(|case| check(&tested, case));
    }
}

#[test]
fn the_cpu_s_bits_depend_on_neither_threads_nor_instruction_set() {
    let cpus = cpus();
    for case in cases::all().iter().chain(&decoder::decoders()) {
        let first = run(cpus[0].backend.as_ref(), case, Schedule::Whole, false);
        for tested in &cpus[1..] {
            let rows = run(tested.backend.as_ref(), case, Schedule::Mixed(5), true);
            same(tested, case, &first, &rows, &format!("from {}", cpus[0].name));
        }
    }
}

/// Exact integer sums, and one order of f32 sums: quantized linears have the same bits everywhere.
#[test]
fn quantized_linears_have_the_cpu_s_bits_on_cuda() {
    let Some(cuda) = cuda(Options::default()) else { return };
    let cpu = scalar();
    for case in cases::all().iter().filter(|case| case.name.contains("linear w")) {
        let rows = run(cpu.backend.as_ref(), case, Schedule::Whole, false);
        for schedule in [Schedule::Whole, Schedule::Alone, Schedule::Mixed(6)] {
            let found = run(cuda.backend.as_ref(), case, schedule, false);
            same(&cuda, case, &rows, &found, &format!("from {} ({schedule:?})", cpu.name));
        }
    }
}

/// The simplest of the CPU's variants.
fn scalar() -> Tested {
    cpus().into_iter().find(|cpu| cpu.name.starts_with("cpu scalar")).expect("every machine has it")
}

/// One row and several, whole tiles and parts of them; 25 and more meet two kernels: that for many rows on a
/// device of one multiprocessor, the others on one of very many.
#[test]
fn coarse_linears_have_the_cpu_s_bits_in_every_kernel() {
    if cuda(Options::default()).is_none() {
        return;
    }
    let cpu = scalar();
    for rows in [1, 7, 8, 16, 25, 40, 90] {
        for case in cases::coarse_linears(&[rows]) {
            let right = run(cpu.backend.as_ref(), &case, Schedule::Whole, false);
            for multiprocessors in [1, 1 << 20] {
                let device = CudaBackend::emulated_on(multiprocessors, Options::default());
                let name = format!("cuda of {multiprocessors}");
                let tested = Tested { name, backend: Box::new(device), allowed: bounds::cuda };
                let found = run(tested.backend.as_ref(), &case, Schedule::Whole, true);
                same(&tested, &case, &right, &found, &format!("from {}: {rows} rows", cpu.name));
            }
        }
    }
}

/// Whatever order threads run in and whenever copies land, the bits are the same: a missing barrier
/// or wait would change them.
#[test]
fn cuda_s_bits_depend_on_neither_thread_order_nor_copy_timing() {
    let Some(first) = cuda(Options::default()) else { return };
    for case in cases::all().iter().chain(&decoder::decoders()) {
        let rows = run(first.backend.as_ref(), case, Schedule::Whole, false);
        for options in Options::all() {
            let tested = cuda(options).expect("it was there before");
            let found = run(tested.backend.as_ref(), case, Schedule::Mixed(7), false);
            same(&tested, case, &rows, &found, &format!("with {options:?}"));
        }
    }
}
