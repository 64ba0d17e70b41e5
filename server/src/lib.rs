//! The `foretoken` command as a library: arguments in, text out, an exit code at the end.
//!
//! This is the only crate that knows the command line, the terminal, the clock and HTTP.
//! Not here: models, kernels, sampling (crates `engine`, `kernels`, `quant`).
//!
//! Start at [`cli`] (what can be typed), then [`run`] (what the main command does).

#![forbid(unsafe_code)]

mod bench;
pub mod cli;
#[allow(dead_code, reason = "called where the automatic draft length is asked for")]
mod costs;
mod demo;
mod devices;
mod environment;
mod generate;
mod inspect;
mod io;
mod load;
mod logits;
mod rank;
mod run;
mod serve;
mod speculate;
mod speed;
mod traffic;
mod verify;

pub use io::Io;

use clap::Parser;
use std::ffi::OsString;

/// Exit code of a mistake of the caller: a wrong flag, path, model or request.
pub const EXIT_USER: u8 = 2;

/// Runs the command `args` (the program's name first) and returns its exit code.
///
/// 0 is success, 1 a failure while running, 2 a mistake of the caller explained in one sentence
/// on `io.err`.
pub fn main_with(args: impl IntoIterator<Item = OsString>, io: &mut Io<'_>) -> u8 {
    let parsed = match cli::Cli::try_parse_from(args) {
        Ok(parsed) => parsed,
        Err(e) => return usage(&e, io),
    };
    match dispatch(&parsed.command, io) {
        Ok(()) => 0,
        Err(e) if io::is_closed_pipe(&e) => 0,
        Err(e) => {
            // Nothing more can be said where even standard error is gone.
            let _ = writeln!(io.err, "foretoken: {e:#}");
            if e.is::<load::Unexpected>() { 1 } else { EXIT_USER }
        }
    }
}

fn dispatch(command: &cli::Command, io: &mut Io<'_>) -> anyhow::Result<()> {
    match command {
        cli::Command::Run(args) => run::run(args, io),
        cli::Command::Serve(args) => serve::run(args, io),
        cli::Command::Verify(args) => verify::run(args, io),
        cli::Command::DraftRank(args) => rank::run(args, io),
        cli::Command::Logits(args) => logits::run(args, io),
        cli::Command::Inspect(args) => inspect::run(args, io),
        cli::Command::Bench(args) => bench::run(args, io),
        cli::Command::Load(args) => traffic::run(args, io),
        cli::Command::Devices(args) => devices::run(args, io),
        cli::Command::Completions(args) => {
            clap_complete::generate(args.shell, &mut cli::command(), "foretoken", io.out);
            Ok(())
        }
    }
}

fn usage(e: &clap::Error, io: &mut Io<'_>) -> u8 {
    let (text, code) = (e.render(), e.exit_code());
    let out = if e.use_stderr() { &mut *io.err } else { &mut *io.out };
    // As above: there is nobody left to tell.
    let _ = write!(out, "{text}");
    u8::try_from(code).unwrap_or(EXIT_USER)
}
