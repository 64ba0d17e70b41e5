//! What the arguments ask for, and what a failure is.

use super::*;
use crate::cli::{Cli, Command};
use clap::Parser;

fn args(words: &str) -> BenchArgs {
    let words = ["foretoken", "bench"].into_iter().chain(words.split_whitespace());
    match Cli::try_parse_from(words).unwrap().command {
        Command::Bench(args) => *args,
        other => panic!("{other:?}"),
    }
}

fn sizes(words: &str) -> anyhow::Result<(EngineConfig, Vec<usize>)> {
    let args = args(words);
    let subject = Subject::open(&args.subject, args.measuring.device)?;
    let tests = tests(&args, &subject, &prompts(&args, &subject)?)?;
    let tokens = tests.iter().map(|test| test.tokens).collect();
    Ok((config(&args.sweep.draft_tokens, &subject, &tests), tokens))
}

#[test]
fn an_engine_has_room_for_the_longest() {
    let words = "--shape smollm2-135m --draft-shape demo-draft --acceptance 0.5 -n 0,1,40,20";
    let (config, tokens) = sizes(&format!("{words} --draft-tokens 2,40,3")).unwrap();
    assert_eq!((config.max_drafted, tokens), (40, vec![40, 20]), "one token is the prompt's");
    assert_eq!(config.blocks * config.block_len, (MADE_UP_PROMPT + 40).next_multiple_of(16));
    assert_eq!(sizes(words).unwrap().0.max_drafted, POSITIONS, "auto may take as many");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let shape = "--shape smollm2-135m --draft-shape demo-draft --acceptance 0.5";
    for (words, part) in [
        ("-n 1", "above 1"),
        ("-n 8129", "context of 8192"),
        ("--temperature 101", "temperature"),
        ("--temperature NaN", "temperature"),
    ] {
        let refused = format!("{:#}", sizes(&format!("{shape} {words}")).unwrap_err());
        assert!(refused.contains(part), "{words}: {refused}");
    }
}

#[test]
fn texts_that_differ_are_a_failure() {
    let text = |ids: &[u32]| ids.iter().map(|&id| TokenId(id)).collect::<Vec<_>>();
    let (a, b, short) = (text(&[1, 2, 3]), text(&[1, 9, 3]), text(&[1, 2]));
    assert!(compare(0, &[a.clone(), a.clone()], true).is_ok());
    let refused = compare(1, &[a.clone(), a.clone(), b.clone()], true).unwrap_err();
    assert!(refused.is::<Unexpected>() && format!("{refused:#}").contains("prompt 2"));
    assert!(compare(0, &[a.clone(), b], false).is_ok(), "a simulated text is another");
    assert!(compare(0, &[a, short], false).is_err(), "but not a shorter one");
}
