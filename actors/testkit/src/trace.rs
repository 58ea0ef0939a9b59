//! [`Trace`]: what happened when and where, and one number for all of it.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

use skep_kernel::Moment;
use skep_wire::Method;

/// Events that are kept for reading; the hash covers all.
const KEPT: usize = 256;

/// What happened. Nodes are numbered in the order in which they joined, from 1.
///
/// ```
/// use skep_testkit::{Happening, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let node = sim.dht_node(&[]);
///     node.node().kill();
///     let orders = sim.trace().last().into_iter().filter(|event| matches!(event.what, Happening::Ordered("be killed")));
///     assert_eq!(orders.map(|event| event.node).collect::<Vec<_>>(), [node.node().number()]);
/// });
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum Happening {
    /// A node joined the network.
    Joined,
    /// Something was done to a node.
    Ordered(&'static str),
    /// The node sent a call.
    Called {
        /// Whom.
        to: u32,
        /// What.
        method: Method,
    },
    /// A message to the node was lost.
    Lost {
        /// Who sent it.
        from: u32,
    },
    /// A call arrived at the node.
    Arrived {
        /// Who called.
        from: u32,
        /// What.
        method: Method,
    },
    /// The node's call ended.
    Ended {
        /// Whom it had called.
        to: u32,
        /// What.
        method: Method,
        /// How: `answered`, or what kind of error.
        how: &'static str,
    },
    /// Said by the test itself or by a log of the code under test.
    Note(String),
}

/// One line of a trace.
///
/// ```
/// use skep_testkit::{Happening, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     sim.note("here we are");
///     let event = sim.trace().last().pop().expect("something was noted");
///     assert_eq!((event.node, event.what), (0, Happening::Note("here we are".to_owned())));
/// });
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When.
    pub at: Moment,
    /// At which node; 0 is the test.
    pub node: u32,
    /// What.
    pub what: Happening,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.at.as_nanos();
        write!(f, "{:>5}.{:06} s  ", nanos / 1_000_000_000, nanos % 1_000_000_000 / 1000)?;
        match self.node {
            0 => write!(f, "test     ")?,
            node => write!(f, "node {node:<4}")?,
        }
        match &self.what {
            Happening::Joined => write!(f, "joins the network"),
            Happening::Ordered(what) => write!(f, "is ordered to {what}"),
            Happening::Called { to, method } => write!(f, "calls {method} of node {to}"),
            Happening::Lost { from } => write!(f, "never gets a message of node {from}"),
            Happening::Arrived { from, method } => write!(f, "gets {method} of node {from}"),
            Happening::Ended { to, method, how } => write!(f, "{method} of node {to}: {how}"),
            Happening::Note(text) => f.write_str(text),
        }
    }
}

/// The trace of one simulation. Cheap to clone; clones share it.
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::Sim;
///
/// let run = || {
///     Sim::with_seed(1).run(|sim| async move {
///         let _hive = sim.servers(2).experts("m.[0:2]").start().await;
///         sim.advance(Duration::from_secs(60)).await;
///         (sim.trace().events(), sim.trace().hash())
///     })
/// };
/// assert_eq!(run(), run());
/// ```
#[derive(Clone)]
pub struct Trace(Arc<Mutex<Inner>>);

impl Default for Trace {
    /// An empty trace; `SKEP_TRACE` in the environment has every event printed as it happens.
    fn default() -> Self {
        let is_printed = std::env::var_os("SKEP_TRACE").is_some();
        Self(Arc::new(Mutex::new(Inner { is_printed, hash: Fnv::default(), events: 0, last: VecDeque::new() })))
    }
}

struct Inner {
    is_printed: bool,
    hash: Fnv,
    events: u64,
    last: VecDeque<Event>,
}

impl Trace {
    pub(crate) fn add(&self, at: Moment, node: u32, what: Happening) {
        let mut inner = self.lock();
        let Inner { is_printed, hash, events, last } = &mut *inner;
        *events += 1;
        hash.number(at.as_nanos());
        hash.number(u64::from(node));
        hash.happening(&what);
        if last.len() == KEPT {
            last.pop_front();
        }
        let event = Event { at, node, what };
        if *is_printed {
            eprintln!("{event}");
        }
        last.push_back(event);
    }

    /// One number for all events so far, their times and places: equal runs have equal ones.
    pub fn hash(&self) -> u64 {
        self.lock().hash.0
    }

    /// How many events there were.
    pub fn events(&self) -> u64 {
        self.lock().events
    }

    /// The last events, at most 256, the latest last.
    pub fn last(&self) -> Vec<Event> {
        self.lock().last.iter().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nothing panics while it holds the trace")
    }
}

/// FNV-1a: the same on every machine.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn number(&mut self, number: u64) {
        self.bytes(&number.to_le_bytes());
    }

    fn happening(&mut self, what: &Happening) {
        match what {
            Happening::Joined => self.bytes(b"j"),
            Happening::Ordered(text) => self.bytes(text.as_bytes()),
            Happening::Called { to, method } => self.call(b"c", *to, *method, ""),
            Happening::Lost { from } => {
                self.bytes(b"l");
                self.number(u64::from(*from));
            }
            Happening::Arrived { from, method } => self.call(b"a", *from, *method, ""),
            Happening::Ended { to, method, how } => self.call(b"e", *to, *method, how),
            Happening::Note(text) => self.bytes(text.as_bytes()),
        }
    }

    fn call(&mut self, kind: &[u8], node: u32, method: Method, how: &str) {
        self.bytes(kind);
        self.number(u64::from(node));
        self.number(method as u64);
        self.bytes(how.as_bytes());
    }
}
