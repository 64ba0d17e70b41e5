//! Which tests the arguments ask for, and what a row says of its times.

use super::*;
use crate::cli::{Cli, Command};
use clap::Parser;
use std::time::Duration;

fn args(words: &str) -> BenchArgs {
    let words = ["foretoken", "bench"].into_iter().chain(words.split_whitespace());
    match Cli::try_parse_from(words).unwrap().command {
        Command::Bench(args) => *args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_combination_is_a_test() {
    let names = |words: &str| -> Vec<String> {
        let tests = tests(&args(words)).unwrap();
        let rows = |t: &Test| if let Phase::Verify(rows) = &t.phase { rows.len() } else { 1 };
        tests.iter().flat_map(|t| (0..rows(t)).map(|i| t.name(i).0)).collect()
    };
    assert_eq!(names(""), ["pp512", "tg128"]);
    let all = names("-p 16,32 -n 8 -d 0,64 -b 1,4");
    let shallow = ["pp16", "pp32", "tg8", "tg8 b4"].map(str::to_owned);
    let deep = shallow.clone().map(|name| format!("{name} @ d64"));
    assert_eq!(all, [shallow, deep].concat());
    assert_eq!(names("-p 0 -n 0 --verify 1,4,8"), ["verify1", "verify4", "verify8"]);
    assert!(tests(&args("-p 0 -n 0")).unwrap_err().to_string().contains("nothing to measure"));
}

#[test]
fn a_runner_has_room_for_all_tests() {
    let tests = tests(&args("-p 16 -n 8 -d 0,100 -b 1,4 --verify 32")).unwrap();
    let needs = tests.iter().fold(Needs::default(), |most, test| test.needs(most));
    assert_eq!((needs.sequences, needs.positions, needs.verified), (4, 132, 32));
    let limits = needs.limits();
    assert_eq!((limits.tokens, limits.outputs, limits.blocks), (132, 32, 4 * 9));
}

#[test]
fn rows_have_the_columns_of_their_tables() {
    let timed = |millis: u64| {
        let work = work::Work { bytes: 2e6, ops: 4e6, int_ops: 3e6 };
        Timed { time: Duration::from_millis(millis), work }
    };
    let test = Test { phase: Phase::Verify(vec![1, 4]), depth: 7, batch: 1 };
    let times = [[10, 20], [12, 18], [11, 33]].map(|pair| pair.map(timed).to_vec());
    let kept = Kept { values: times.to_vec(), dropped: 2, loud: false, foreign: Some(0.25) };
    let ceilings = Ceilings { read: 1e9, int8: Some(1e9) };
    let args = args("--shape tinyllama-1.1b -t 3");
    let subject = Subject::open(&args.subject, DeviceName::Cpu).unwrap();
    let setting = places(&args.measuring).unwrap()[0].setting(&subject);
    let rows = Measured { kept, ceilings }.rows(&test, &setting);
    let row = to_row(&rows[1]).unwrap();
    let columns: Vec<&str> = STEPS.columns().map(|(key, _)| *key).collect();
    assert_eq!(row.keys().collect::<Vec<_>>(), columns);
    assert_eq!(row["test"], "verify4 @ d7");
    assert_eq!((&row["threads"], &row["parameters"]), (&3.into(), &1_100_048_384u64.into()));
    assert_eq!(row["format"], "w4g128, head w8g128");
    let near = |key: &str, value: f64| {
        let found = row[key].as_f64().unwrap();
        assert!((found / value - 1.0).abs() < 1e-9, "{key}: {found}, not {value}");
    };
    near("seconds", 0.020);
    near("tokens_per_second", 4.0 / 0.020);
    near("tokens_per_second_min", 4.0 / 0.033);
    near("bytes_per_second", 2e6 / 0.020);
    near("share_of_read_bandwidth", 0.1);
    near("share_of_int8_peak", 3e6 / 0.020 / 1e9);
    // ratios within repetitions: 2, 1.5, 3
    near("verify_cost", 2.0);
    near("verify_cost_min", 1.5);
    near("verify_cost_max", 3.0);
    let cells: Vec<String> = STEPS.cells.iter().map(|cell| (cell.text)(&row)).collect();
    let shown = ["tinyllama-1.1b", "697.4 MB", "1.10 B", "verify4 @ d7", "2.00", "25 %, 2 dropped"];
    assert!(shown.iter().all(|text| cells.contains(&(*text).to_owned())), "{cells:?}");
}

#[test]
fn places_are_thread_counts_of_a_device() {
    let threads = |words: &str| -> anyhow::Result<Vec<usize>> {
        Ok(places(&args(words).measuring)?.iter().map(|place| place.threads).collect())
    };
    assert_eq!(threads("-t 1,2").unwrap(), [1, 2]);
    assert_eq!(threads("").unwrap(), [available_threads()]);
    assert_eq!(threads("--device reference").unwrap(), [1]);
    assert!(threads("--device reference -t 2").is_err());
}
