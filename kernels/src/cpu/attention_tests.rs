//! Attention and the KV cache against loops in f64, on every processor.

use super::super::isa::Machine;
use super::super::kv::{KvCache, KvWrite};
use super::super::pages::Arena;
use super::super::testing::machines;
use super::*;
use crate::program::KvDecl;
use proptest::prelude::*;
use testkit::Rng;

/// One sequence's keys and values `[positions, heads * width]`.
struct Sequence {
    heads: usize,
    width: usize,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Sequence {
    fn random(seed: u64, positions: usize, heads: usize, width: usize) -> Self {
        let mut rng = Rng::new(seed);
        let mut floats = || rng.floats(positions * heads * width, 1.5);
        Self { heads, width, k: floats(), v: floats() }
    }

    /// The first positions alone.
    fn until(&self, positions: usize) -> Self {
        let len = positions * self.heads * self.width;
        let (k, v) = (self.k[..len].to_vec(), self.v[..len].to_vec());
        Self { heads: self.heads, width: self.width, k, v }
    }

    fn positions(&self) -> usize {
        self.k.len() / self.heads / self.width
    }

    /// The cache after all positions are written into a shuffled table, the rest poisoned.
    fn cache(&self, machine: Machine, block_len: usize) -> (KvCache, Vec<BlockId>) {
        let (positions, row) = (self.positions(), self.heads * self.width);
        let blocks = positions.div_ceil(block_len) + 1;
        let table: Vec<_> = Rng::new(7).permutation(blocks).into_iter().map(BlockId).collect();
        let decl = KvDecl { heads: self.heads, head_width: self.width };
        let mut cache = KvCache::new(&Arena::default(), &decl, (blocks, block_len)).unwrap();
        cache.poison(&vec![0; blocks]);
        for p in 0..positions {
            let (block, at, shape) = (table[p / block_len].index(), p % block_len, cache.shape);
            let (k, v) = (&self.k[p * row..][..row], &self.v[p * row..][..row]);
            let (keys, values) = (cache.keys.sink_mut(), cache.values.sink_mut());
            machine.run(KvWrite { shape, block, at, k, v, keys, values });
        }
        (cache, table)
    }

    /// Outputs `[tokens, heads * width]` of the last tokens for one KV head.
    fn attend(&self, machine: Machine, block_len: usize, job: &Job, q: &[f32]) -> Vec<f32> {
        let (mut cache, table) = self.cache(machine, block_len);
        let mut out = vec![f32::NAN; q.len()];
        let row = job.heads * self.width;
        machine.run(Attend {
            shape: cache.shape,
            keys: cache.keys.all_mut(),
            values: cache.values.all_mut(),
            table: &table,
            head: job.head,
            position: self.positions() - q.len() / row,
            mask: job.mask,
            scale: 0.3,
            q: Mat::new(q, row),
            out: MatMut::new(&mut out, row),
            heads: job.heads,
        });
        out
    }

    /// The same in f64 over keys and values rounded to f16.
    fn exact(&self, head: usize, visible: Range<usize>, q: &[f32]) -> Vec<f64> {
        let stored = |x: f32| half::f16::from_f32(x).to_f64();
        let row = |all: &[f32], p: usize| -> Vec<f64> {
            let start = (p * self.heads + head) * self.width;
            all[start..start + self.width].iter().map(|x| stored(*x)).collect()
        };
        let mut out = vec![];
        for q in q.chunks(self.width) {
            let score = |p: usize| {
                let k = row(&self.k, p);
                0.3 * k.iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>()
            };
            let weights: Vec<f64> = visible.clone().map(|p| score(p).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sums = vec![0.0; self.width];
            for (weight, p) in weights.iter().zip(visible.clone()) {
                for (sum, v) in sums.iter_mut().zip(row(&self.v, p)) {
                    *sum += weight / total * v;
                }
            }
            out.extend(sums);
        }
        out
    }
}

/// What to compute.
struct Job {
    /// KV head.
    head: usize,
    /// Query heads.
    heads: usize,
    mask: Mask,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_isa_block_length_and_company_gives_the_same_bits_near_f64(
        seed: u64,
        positions in 1usize..200,
        tokens in 1usize..12,
        kv_heads in 1usize..3,
        heads in 1usize..6,
        width in prop_oneof![Just(64usize), Just(16), 1usize..40],
        block_len in prop_oneof![Just(1usize), Just(16), 1usize..40],
        mask in prop_oneof![Just(Mask::Causal), (1u32..100).prop_map(Mask::Window)],
    ) {
        let all = Sequence::random(seed, positions, kv_heads, width);
        let tokens = tokens.min(positions);
        let row = heads * width;
        let q = Rng::new(seed ^ 1).floats(tokens * row, 1.0);
        let job = Job { head: kv_heads - 1, heads, mask };
        let mut alone = vec![];
        for (i, q) in q.chunks(row).enumerate() {
            let earlier = all.until(positions - tokens + i + 1);
            let out = earlier.attend(Machine::Scalar, 16, &job, q);
            let seen = visible(mask, earlier.positions() - 1);
            for (found, exact) in out.iter().zip(earlier.exact(job.head, seen, q)) {
                // weights off by some 1e-6 (f32 scores up to 20), values up to 1.5
                prop_assert!((f64::from(*found) - exact).abs() < 2e-5, "{found} for {exact}");
            }
            alone.extend(out);
        }
        for machine in machines() {
            prop_assert_eq!(&all.attend(machine, block_len, &job, &q), &alone);
        }
    }
}

#[test]
fn many_query_heads_go_in_turns() {
    let all = Sequence::random(3, 90, 1, 32);
    let q = Rng::new(4).floats(37 * 32, 1.0);
    let job = |heads| Job { head: 0, heads, mask: Mask::Causal };
    let together = all.attend(Machine::Scalar, 16, &job(37), &q);
    for (q, out) in q.chunks(32).zip(together.chunks(32)) {
        assert_eq!(all.attend(Machine::Scalar, 16, &job(1), q), out);
    }
}

#[test]
fn one_visible_position_gives_its_value() {
    let all = Sequence::random(5, 70, 2, 48);
    let q = Rng::new(6).floats(48, 1.0);
    for machine in machines() {
        let out = all.attend(machine, 8, &Job { head: 1, heads: 1, mask: Mask::Window(1) }, &q);
        let value = &all.v[(69 * 2 + 1) * 48..][..48];
        let stored: Vec<f32> = value.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect();
        assert_eq!(out, stored);
    }
}

#[test]
fn masks_say_what_is_visible() {
    assert_eq!(visible(Mask::Causal, 4), 0..5);
    assert_eq!(visible(Mask::Window(3), 4), 2..5);
    assert_eq!(visible(Mask::Window(9), 4), 0..5);
}

#[test]
fn items_give_every_thread_work() {
    let even = |shared, threads, kv_heads: usize, rows: usize| {
        item_size(shared, threads, |tokens| rows.div_ceil(tokens) * kv_heads)
    };
    assert_eq!(even(8, 1, 4, 1), [8, 8]);
    assert_eq!(even(8, 2, 4, 1), [8, 8]);
    assert_eq!(even(8, 2, 4, 512), [8, 8]);
    // Four KV heads for three threads: two parts of each; one for four: quarters of it.
    assert_eq!(even(8, 3, 4, 1), [1, 2]);
    assert_eq!(even(8, 4, 1, 1), [1, 2]);
    assert_eq!(even(1, 4, 2, 16), [8, 1]);
    assert_eq!(even(1, 16, 1, 1), [1, 1]);
    assert_eq!(even(100, 2, 1, 7), [1, 50]);
}

#[test]
fn long_contexts_of_wide_heads_match_alone_and_together() {
    // Blocks of 20 positions split tiles; heads wider than the room for widened keys read them as
    // they lie; the window ends within chunks, so that few queries see the first of them.
    let shapes = [
        (128, 21, 16, Mask::Causal),
        (64, 40, 20, Mask::Window(140)),
        (264, 9, 16, Mask::Causal),
        (80, 33, 3, Mask::Causal),
    ];
    for (width, tokens, block_len, mask) in shapes {
        let all = Sequence::random(8, 300, 1, width);
        let q = Rng::new(9).floats(tokens * 4 * width, 1.0);
        let job = Job { head: 0, heads: 4, mask };
        let alone = |i: usize| {
            let earlier = all.until(300 - tokens + i + 1);
            earlier.attend(Machine::Scalar, 32, &job, &q[i * 4 * width..][..4 * width])
        };
        let alone: Vec<f32> = (0..tokens).flat_map(alone).collect();
        for machine in machines() {
            let together = all.attend(machine, block_len, &job, &q);
            assert!(together == alone, "width {width}, {tokens} tokens, blocks of {block_len}");
        }
    }
}
