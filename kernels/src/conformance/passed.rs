//! Every barrier and every wait of the CUDA kernels is noticed when it is missing.
//!
//! The emulator passes one of them by; then some case must give other bits, or fail, under some order
//! of threads. Not here: whether results are right ([`super::bounds`], [`super::invariance`]).

use super::case::Case;
use super::session::{Rows, Schedule, run};
use super::{cases, choice, cuda, decoder, joined};
use crate::program::TokenId;
use emulator::Options;
use std::panic::{AssertUnwindSafe, catch_unwind};

const SCHEDULES: [Schedule; 2] = [Schedule::Whole, Schedule::Mixed(8)];

/// Cases that come by all barriers and waits: each kernel that has one, over several rounds of its
/// loops.
fn chosen() -> Vec<Case> {
    let names = [
        "norm: d 257",
        "linear w4: w4g32 [20, 2176]",
        "linear w8: w8g32 [20, 2176]",
        "linear f16: [17, 1030]",
    ];
    let long = |case: &Case| {
        let lens = ["lens [530]", "lens [270]"];
        case.name.starts_with("attend") && lens.iter().any(|lens| case.name.ends_with(lens))
    };
    let chosen = |case: &Case| long(case) || names.iter().any(|name| case.name.starts_with(name));
    let several = cases::all().into_iter().filter(chosen);
    several.chain(joined::all()).chain(decoder::decoders().into_iter().take(1)).collect()
}

/// What a case gives on a device; none where it fails.
fn outcome(case: &Case, schedule: Schedule, options: Options) -> Option<Rows> {
    let tested = cuda(options)?;
    catch_unwind(AssertUnwindSafe(|| run(tested.backend.as_ref(), case, schedule, true))).ok()
}

/// The tokens that a device chooses; none where it fails.
fn chosen_tokens(options: Options) -> Option<Vec<Option<TokenId>>> {
    let tested = cuda(options)?;
    catch_unwind(AssertUnwindSafe(|| choice::tokens(&tested))).ok()
}

/// The lines of the kernels' text that have a barrier or a wait for copies, with their files.
fn lines() -> Vec<(&'static str, u32)> {
    let mut found = vec![];
    for source in shaders::CUDA_HEADERS.iter().chain(shaders::CUDA) {
        for (line, text) in (1..).zip(source.text.lines()) {
            let code = text.split("//").next().unwrap_or("");
            // `copy_async_wait<` is a call, without `<` the prelude's definition.
            if ["__syncthreads()", "copy_async_wait<"].iter().any(|wait| code.contains(wait)) {
                found.push((source.name, line));
            }
        }
    }
    found
}

#[test]
fn no_barrier_and_no_wait_can_be_left_out() {
    if cuda(Options::default()).is_none() {
        return;
    }
    let mut expected = vec![];
    for case in chosen() {
        for schedule in SCHEDULES {
            let rows = outcome(&case, schedule, Options::default());
            expected.push((case.clone(), schedule, rows.expect("it works with all of them")));
        }
    }
    let choice = chosen_tokens(Options::default());
    assert!(choice.is_some(), "it works with all of them");
    let sites = emulator::sites();
    println!("barriers and waits: {sites:?}");
    let come_by = |(file, line): &(&str, u32)| {
        let name = file.trim_start_matches("cuda/");
        sites.iter().any(|site| site.line == *line && site.file.to_string_lossy().ends_with(name))
    };
    let missed: Vec<_> = lines().into_iter().filter(|line| !come_by(line)).collect();
    assert!(missed.is_empty(), "no case comes by {missed:?}");
    for site in sites {
        let noticed = Options::all().into_iter().any(|options| {
            let options = Options { passed: Some(site), ..options };
            let differs = |(case, schedule, rows): &(Case, Schedule, Rows)| {
                outcome(case, *schedule, options).as_ref() != Some(rows)
            };
            chosen_tokens(options) != choice || expected.iter().any(differs)
        });
        assert!(noticed, "nothing notices that {site:?} is missing");
    }
}
