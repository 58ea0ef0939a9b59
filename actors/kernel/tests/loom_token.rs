//! The ready token under every interleaving that loom finds: the real source, compiled against loom's atomics.

#[path = "../src/token.rs"]
mod token;

mod sync {
    pub use loom::sync::atomic::{AtomicU8, Ordering};
}

use std::collections::VecDeque;

use loom::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};
use token::{Parking, ReadyToken};

/// One expert, its mailbox and its group's queue of tokens.
struct Group {
    token: ReadyToken,
    mailbox: Mutex<Option<usize>>,
    tokens: Mutex<VecDeque<()>>,
    alarms: Mutex<usize>,
    /// Batches, counted by a load and a store: the count comes out wrong if two executors own the expert at once.
    batches: AtomicUsize,
    runs: AtomicUsize,
    served: AtomicUsize,
    refused: AtomicUsize,
    drained: AtomicUsize,
    drains: AtomicUsize,
}

impl Group {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            token: ReadyToken::new(),
            mailbox: Mutex::new(Some(0)),
            tokens: Mutex::new(VecDeque::new()),
            alarms: Mutex::new(0),
            batches: AtomicUsize::new(0),
            runs: AtomicUsize::new(0),
            served: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            drained: AtomicUsize::new(0),
            drains: AtomicUsize::new(0),
        })
    }

    fn push(&self) {
        match &mut *self.mailbox.lock().unwrap() {
            Some(waiting) => *waiting += 1,
            None => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
        if self.token.on_push() {
            self.queue_token();
        }
    }

    fn queue_token(&self) {
        let mut tokens = self.tokens.lock().unwrap();
        tokens.push_back(());
        assert!(tokens.len() <= 1 || self.is_closed(), "two tokens for one expert");
    }

    fn is_closed(&self) -> bool {
        self.token.state() == token::State::Closed
    }

    /// Takes one token, if there is one, and serves one batch of at most one task.
    fn execute(&self) {
        let token = self.tokens.lock().unwrap().pop_front();
        if token.is_some() && self.token.on_take() {
            self.run_batch();
        }
    }

    fn run_batch(&self) {
        let batch = self.batches.load(Ordering::Relaxed);
        let more = match &mut *self.mailbox.lock().unwrap() {
            Some(waiting) if *waiting > 0 => {
                *waiting -= 1;
                self.served.fetch_add(1, Ordering::Relaxed);
                *waiting > 0
            }
            _ => false,
        };
        self.runs.fetch_add(1, Ordering::Relaxed);
        self.batches.store(batch + 1, Ordering::Relaxed);
        if self.token.on_finish(more) {
            self.queue_token();
        }
    }

    /// As `execute`, with a least batch of two; parks below it.
    fn execute_or_park(&self) {
        let token = self.tokens.lock().unwrap().pop_front();
        if token.is_none() || !self.token.on_take() {
            return;
        }
        while self.mailbox.lock().unwrap().is_some_and(|waiting| waiting < 2) {
            match self.token.on_park() {
                Parking::Parked => *self.alarms.lock().unwrap() += 1,
                Parking::LookAgain => continue,
                Parking::Closed => {}
            }
            return;
        }
        self.run_batch();
    }

    fn ring(&self) {
        let rang = {
            let mut alarms = self.alarms.lock().unwrap();
            let set = *alarms > 0;
            *alarms -= usize::from(set);
            set
        };
        if rang && self.token.on_alarm() {
            self.run_batch();
        }
    }

    fn close(&self) {
        if self.token.close() {
            self.drains.fetch_add(1, Ordering::Relaxed);
            let waiting = self.mailbox.lock().unwrap().take().unwrap_or(0);
            self.drained.fetch_add(waiting, Ordering::Relaxed);
        }
    }

    /// What a later executor finds: runs tokens, then alarms, until neither is left.
    fn settle(&self) {
        while !self.tokens.lock().unwrap().is_empty() {
            self.execute();
        }
        while *self.alarms.lock().unwrap() > 0 {
            self.ring();
            while !self.tokens.lock().unwrap().is_empty() {
                self.execute();
            }
        }
    }
}

fn model(threads: impl Fn(&Arc<Group>) -> Vec<Box<dyn FnOnce() + Send>> + Sync + Send + 'static, pushes: usize) {
    let mut loom = loom::model::Builder::new();
    loom.preemption_bound = Some(3);
    loom.check(move || {
        let group = Group::new();
        let running: Vec<_> = threads(&group).into_iter().map(|work| thread::spawn(work)).collect();
        for thread in running {
            thread.join().unwrap();
        }
        group.settle();
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        assert_eq!(count(&group.served) + count(&group.refused) + count(&group.drained), pushes, "lost work");
        assert_eq!(count(&group.drains), usize::from(group.is_closed()), "drained once if closed");
    });
}

fn on(group: &Arc<Group>, work: impl FnOnce(&Group) + Send + 'static) -> Box<dyn FnOnce() + Send> {
    let group = group.clone();
    Box::new(move || work(&group))
}

#[test]
fn no_push_is_lost_and_no_expert_runs_twice_at_once() {
    let threads = |group: &Arc<Group>| {
        vec![
            on(group, |group| {
                group.push();
                group.push();
            }),
            on(group, Group::execute),
            on(group, Group::execute),
        ]
    };
    model(threads, 2);
}

#[test]
fn pushes_from_two_sides_queue_one_token() {
    let threads = |group: &Arc<Group>| vec![on(group, Group::push), on(group, Group::push), on(group, Group::execute)];
    model(threads, 2);
}

#[test]
fn removal_drains_exactly_once() {
    let threads = |group: &Arc<Group>| {
        vec![
            on(group, |group| {
                group.push();
                group.close();
            }),
            on(group, Group::close),
            on(group, Group::execute),
        ]
    };
    model(threads, 1);
}

#[test]
fn a_push_during_removal_is_served_refused_or_drained() {
    let threads = |group: &Arc<Group>| vec![on(group, Group::push), on(group, Group::execute), on(group, Group::close)];
    model(threads, 1);
}

#[test]
fn a_parked_expert_wakes_by_work_or_by_its_alarm() {
    let threads = |group: &Arc<Group>| {
        vec![
            on(group, |group| {
                group.push();
                group.push();
            }),
            on(group, Group::execute_or_park),
            on(group, Group::ring),
        ]
    };
    model(threads, 2);
}

#[test]
fn a_parked_expert_can_be_removed() {
    let threads = |group: &Arc<Group>| {
        vec![
            on(group, Group::push),
            on(group, Group::execute_or_park),
            on(group, |group| {
                group.close();
                group.ring();
            }),
        ]
    };
    model(threads, 1);
}
