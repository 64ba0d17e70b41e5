//! Prompt lookup: proposes the tokens that followed the longest suffix of a text where it occurred
//! before. Its input is one sequence's prompt and accepted tokens, in order.
//!
//! Not here: whether a proposal is worth verifying, which depends on [`Lookup::matched`] and on
//! costs; and drafted tokens that may yet be rejected, since nothing is ever removed.
//!
//! The index is the suffix automaton of the text, built token by token (Blumer et al., "The
//! smallest automaton recognizing the subwords of a text", 1985): at most 2n states and 3n edges
//! for n tokens, whatever the text, in time that is linear in them. Drafting from one follows
//! SAM Decoding (Hu et al., 2024).

use kernels::program::TokenId;
use std::collections::HashMap;

/// State of the empty string, which every chain of links ends in and no edge leads to.
const ROOT: u32 = 0;

/// Most tokens of a text, so that its states are counted in 32 bits.
const MOST_TOKENS: usize = (u32::MAX / 2) as usize;

/// Most states whose latest end a token renews. Longer chains of links occur in texts that repeat
/// themselves at once, where the states beyond keep an older end, and a token must stay cheap.
const MOST_RENEWED: usize = 16;

/// Index over the text of one sequence that finds what followed its longest repeated suffix.
///
/// About 70 bytes a token of source code and at most 143 of any text; see [`Lookup::bytes`].
#[derive(Debug, Clone)]
pub struct Lookup {
    tokens: Vec<TokenId>,
    states: Vec<State>,
    /// Edges of a state beyond its first, by state and token. Tokens come from outside, so its hash
    /// is keyed; its order, which that makes random, is never read.
    more: HashMap<(u32, TokenId), Edge>,
    /// State of the whole text.
    last: u32,
    /// Where the longest repeated suffix ended before: the next token's index.
    earlier: u32,
}

/// Strings that end at the same places of the text; all are suffixes of the longest one.
#[derive(Debug, Clone)]
struct State {
    /// Tokens of the longest.
    len: u32,
    /// State of the longest suffix that ends at more places.
    link: u32,
    /// A recent place: the index of the token after it.
    end: u32,
    /// Token of the first edge, if there is one.
    token: TokenId,
    /// Where the first edge leads; [`ROOT`] if there is none.
    target: u32,
    /// Token of the newest edge, from which [`Edge::before`] leads to the first.
    newest: TokenId,
}

/// An edge that is not the first of its state.
#[derive(Debug, Clone, Copy)]
struct Edge {
    target: u32,
    /// Token of the edge that the state got before this one.
    before: TokenId,
}

impl Default for Lookup {
    /// The index of the empty text.
    fn default() -> Self {
        Self {
            tokens: Vec::new(),
            states: vec![State::new(0)],
            more: HashMap::new(),
            last: ROOT,
            earlier: 0,
        }
    }
}

impl State {
    /// A state without edges and link, of a string as long as the text.
    fn new(len: u32) -> Self {
        let token = TokenId(0);
        Self { len, link: ROOT, end: len, token, target: ROOT, newest: token }
    }
}

impl Lookup {
    /// Tokens of the text.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether the text has no token yet.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Bytes of memory held, with what is reserved for growth.
    pub fn bytes(&self) -> usize {
        // The map fills at most 7 of 8 places, and has a byte beside each.
        let places = self.more.capacity().div_ceil(7) * 8;
        self.tokens.capacity() * size_of::<TokenId>()
            + self.states.capacity() * size_of::<State>()
            + places * (size_of::<((u32, TokenId), Edge)>() + 1)
    }

    /// Appends accepted tokens to the text; those beyond 2^31 tokens are ignored.
    pub fn extend(&mut self, tokens: &[TokenId]) {
        let room = MOST_TOKENS - self.tokens.len();
        tokens.iter().take(room).for_each(|&token| self.push(token));
    }

    /// Tokens of the longest suffix of the text that also ends earlier in it; 0 if none does.
    /// The two may overlap.
    pub fn matched(&self) -> usize {
        self.states[self.state(self.last).link as usize].len as usize
    }

    /// Appends to `out` the `most` tokens that followed the matched suffix where it ended before;
    /// nothing if less than `least_match` tokens, or none, are matched.
    ///
    /// Of several earlier ends it is the latest, except in texts of so many nested repetitions that
    /// keeping it would cost more than a bounded time a token. Where the tokens that followed reach
    /// the end of the text, the proposal goes on into itself: "abcab" proposes "cabcabcab".
    pub fn propose(&self, most: usize, least_match: usize, out: &mut Vec<TokenId>) {
        if self.matched() >= least_match.max(1) {
            let followed = &self.tokens[self.earlier as usize..];
            out.extend(followed.iter().cycle().take(most));
        }
    }

    fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        let end = self.tokens.len() as u32;
        let new = self.add(State::new(end));
        let link = self.connect(token, new);
        self.states[new as usize].link = link;
        self.last = new;
        self.earlier = self.state(link).end;
        self.renew(link, end);
    }

    fn state(&self, id: u32) -> &State {
        &self.states[id as usize]
    }

    fn add(&mut self, state: State) -> u32 {
        self.states.push(state);
        self.states.len() as u32 - 1
    }

    /// Leads every suffix of the old text that `token` never followed to state `new`. Returns the
    /// state of the longest suffix of the new text that occurred before.
    fn connect(&mut self, token: TokenId, new: u32) -> u32 {
        let mut at = self.last;
        loop {
            if let Some(&mut target) = self.target(at, token) {
                return self.longest(at, token, target);
            }
            self.add_edge(at, token, new);
            if at == ROOT {
                return ROOT;
            }
            at = self.state(at).link;
        }
    }

    /// The state whose longest string is that of `at` and `token`, which lead to `target`: `target`
    /// itself, or a new one split off it if `target` also has longer strings.
    fn longest(&mut self, mut at: u32, token: TokenId, target: u32) -> u32 {
        let len = self.state(at).len + 1;
        if self.state(target).len == len {
            return target;
        }
        let short = self.split(target, len);
        while let Some(to) = self.target(at, token).filter(|to| **to == target) {
            *to = short;
            if at == ROOT {
                break;
            }
            at = self.state(at).link;
        }
        short
    }

    /// A new state for the strings of `from` of at most `len` tokens, with the same edges.
    fn split(&mut self, from: u32, len: u32) -> u32 {
        let state = State { len, ..self.state(from).clone() };
        let (first, mut token) = (state.token, state.newest);
        let short = self.add(state);
        self.states[from as usize].link = short;
        while token != first {
            let Some(&edge) = self.more.get(&(from, token)) else { break };
            self.more.insert((short, token), edge);
            token = edge.before;
        }
        short
    }

    /// Where `token` leads from state `at`, if anywhere.
    fn target(&mut self, at: u32, token: TokenId) -> Option<&mut u32> {
        let state = &mut self.states[at as usize];
        if state.target == ROOT {
            None
        } else if state.token == token {
            Some(&mut state.target)
        } else if state.token == state.newest {
            None // The only edge: no need to search.
        } else {
            self.more.get_mut(&(at, token)).map(|edge| &mut edge.target)
        }
    }

    /// Adds an edge for a token that has none.
    fn add_edge(&mut self, at: u32, token: TokenId, target: u32) {
        let state = &mut self.states[at as usize];
        let before = std::mem::replace(&mut state.newest, token);
        if state.target == ROOT {
            (state.token, state.target) = (token, target);
        } else {
            self.more.insert((at, token), Edge { target, before });
        }
    }

    /// Notes that the strings of `at`, and of the states it links to, end at `end`.
    fn renew(&mut self, mut at: u32, end: u32) {
        for _ in 0..MOST_RENEWED {
            if at == ROOT {
                break;
            }
            let state = &mut self.states[at as usize];
            state.end = end;
            at = state.link;
        }
    }
}

#[cfg(test)]
#[path = "lookup_tests.rs"]
mod tests;
