//! The mailbox against the simplest model of it: one list, scanned.

use std::time::Duration;

use proptest::prelude::*;
use skep_kernel::{BatchMailbox, Capacity, Key, Moment, PushError, Rows};

const CAPACITY: Capacity = Capacity { rows: Rows(12), bytes: 1000 };

#[derive(Clone, Debug)]
enum Step {
    Push { rows: u32, bytes: usize, key: u64 },
    Take { max_rows: u32, unwanted: u32 },
    Close,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0u32..16, 0usize..600, 0u64..3).prop_map(|(rows, bytes, key)| Step::Push { rows, bytes, key }),
        4 => (0u32..10, 2u32..6).prop_map(|(max_rows, unwanted)| Step::Take { max_rows, unwanted }),
        1 => Just(Step::Close),
    ]
}

#[derive(Clone, Debug)]
struct Item {
    id: u32,
    rows: u32,
    bytes: usize,
    key: u64,
    since: Moment,
}

#[derive(Default)]
struct Model {
    line: Vec<Item>,
    closed: bool,
}

impl Model {
    fn rows(&self) -> u32 {
        self.line.iter().map(|item| item.rows).sum()
    }

    fn push(&mut self, item: Item) -> bool {
        let bytes: usize = self.line.iter().map(|item| item.bytes).sum();
        let fits = self.rows() + item.rows <= CAPACITY.rows.0 && bytes + item.bytes <= CAPACITY.bytes;
        let accepted = !self.closed && (self.line.is_empty() || fits);
        if accepted {
            self.line.push(item);
        }
        accepted
    }

    fn take(&mut self, max_rows: u32, keep: impl Fn(u32) -> bool) -> (Vec<u32>, Vec<u32>) {
        let unwanted = self.line.extract_if(.., |item| !keep(item.id)).map(|item| item.id).collect();
        let Some(head) = self.line.first().map(|item| item.key) else { return (Vec::new(), unwanted) };
        let (mut batch, mut rows, mut full) = (Vec::new(), 0, false);
        self.line.retain(|item| {
            let mine = item.key == head && !full;
            let fits = batch.is_empty() || rows + item.rows <= max_rows;
            full |= mine && !fits;
            if mine && fits {
                rows += item.rows;
                batch.push(item.id);
            }
            !(mine && fits)
        });
        (batch, unwanted)
    }

    fn head_rows(&self) -> u32 {
        let head = self.line.first().map(|item| item.key);
        self.line.iter().filter(|item| Some(item.key) == head).map(|item| item.rows).sum()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_mailbox_does_what_its_model_does(steps in prop::collection::vec(step(), 1..60)) {
        let mailbox = BatchMailbox::new(CAPACITY);
        let mut model = Model::default();
        let mut now = Moment::START;
        for (id, step) in (0..).zip(steps) {
            now = now + Duration::from_millis(1);
            match step {
                Step::Push { rows, bytes, key } => {
                    let pushed = mailbox.try_push(now, id, Rows(rows), bytes, Key(key));
                    let before = (model.rows(), model.line.first().map(|head| head.since));
                    let accepted = model.push(Item { id, rows: rows.max(1), bytes, key, since: now });
                    prop_assert_eq!(pushed.is_ok(), accepted);
                    match pushed {
                        Ok(()) => {}
                        Err(PushError::Closed(closed)) => prop_assert!(model.closed && closed.0 == id),
                        Err(PushError::Full(full)) => {
                            prop_assert_eq!((full.item, full.waiting.0, full.limit), (id, before.0, CAPACITY.rows));
                            prop_assert_eq!(Some(full.oldest_wait), before.1.map(|since| now - since));
                        }
                    }
                }
                Step::Take { max_rows, unwanted } => {
                    let taken = mailbox.take(Rows(max_rows), |id| id % unwanted != 0);
                    let (batch, mut dropped) = model.take(max_rows, |id| id % unwanted != 0);
                    prop_assert_eq!(taken.batch, batch);
                    let mut really_dropped = taken.dropped;
                    really_dropped.sort_unstable();
                    dropped.sort_unstable();
                    prop_assert_eq!(really_dropped, dropped);
                }
                Step::Close => {
                    model.closed = true;
                    let line: Vec<u32> = std::mem::take(&mut model.line).iter().map(|item| item.id).collect();
                    prop_assert_eq!(mailbox.close(), line);
                }
            }
            prop_assert_eq!(mailbox.waiting().0, model.rows());
            prop_assert_eq!(mailbox.head_rows().0, model.head_rows());
            prop_assert_eq!(mailbox.oldest(), model.line.first().map(|head| head.since));
            prop_assert_eq!(mailbox.is_empty(), model.line.is_empty());
        }
    }
}
