//! Waiting for room: in order of arrival, to a deadline, leaving nothing behind.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::join_all, poll};
use skep_kernel::{BatchMailbox, Capacity, Clock, Deadline, Key, PushError, Rows, TokioClock, panics::contain};
use tokio::{pin, task::JoinSet};

const ALL: fn(&u32) -> bool = |_| true;

fn mailbox(rows: u32) -> BatchMailbox<u32> {
    BatchMailbox::new(Capacity { rows: Rows(rows), bytes: usize::MAX })
}

/// Waits at most ten seconds for room.
async fn push(mailbox: &BatchMailbox<u32>, clock: &TokioClock, item: u32, rows: u32) -> Result<(), PushError<u32>> {
    let deadline = Deadline::after(clock.now(), Duration::from_secs(10));
    mailbox.push_when_room(clock, deadline, item, Rows(rows), 0, Key(0)).await
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_enter_in_order_and_before_those_who_do_not() {
    let (mailbox, clock) = (mailbox(2), TokioClock::system());
    push(&mailbox, &clock, 0, 2).await.unwrap();
    let (first, second) = (push(&mailbox, &clock, 1, 2), push(&mailbox, &clock, 2, 1));
    pin!(first, second);
    assert!(poll!(&mut first).is_pending());
    assert!(poll!(&mut second).is_pending());

    assert_eq!(mailbox.take(Rows(9), ALL).batch, [0]);
    let barging = mailbox.try_push(clock.now(), 3, Rows(1), 0, Key(0));
    assert!(matches!(barging, Err(PushError::Full(full)) if full.item == 3));
    assert!(poll!(&mut first).is_ready());
    assert!(poll!(&mut second).is_pending(), "the first fills the mailbox");

    assert_eq!(mailbox.take(Rows(9), ALL).batch, [1]);
    assert!(poll!(&mut second).is_ready());
    assert_eq!(mailbox.take(Rows(9), ALL).batch, [2]);
}

#[tokio::test(start_paused = true)]
async fn the_newest_enter_first_once_many_leave_unserved() {
    let (mailbox, clock) = (mailbox(1), TokioClock::system());
    push(&mailbox, &clock, 0, 1).await.unwrap();
    for _ in 0..20 {
        let mut impatient = Box::pin(push(&mailbox, &clock, 7, 1));
        assert!(poll!(&mut impatient).is_pending());
    }
    let (first, second) = (push(&mailbox, &clock, 1, 1), push(&mailbox, &clock, 2, 1));
    pin!(first, second);
    assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
    assert_eq!(mailbox.take(Rows(9), ALL).batch, [0]);
    assert!(poll!(&mut second).is_ready() && poll!(&mut first).is_pending());

    // Others keep coming, but nobody leaves any more: those who have waited longest have their turn again.
    let mut others = Vec::new();
    for item in 100..500 {
        let mut newer = Box::pin(push(&mailbox, &clock, item, 1));
        assert!(poll!(&mut newer).is_pending());
        others.push(newer);
        mailbox.take(Rows(9), ALL);
        if poll!(&mut first).is_ready() {
            return;
        }
    }
    panic!("the first one starved");
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_at_its_deadline_and_returns_the_item() {
    let (mailbox, clock) = (mailbox(1), TokioClock::system());
    let start = clock.now();
    push(&mailbox, &clock, 0, 1).await.unwrap();
    let Err(PushError::Full(full)) = push(&mailbox, &clock, 1, 1).await else { panic!("there was no room") };
    assert_eq!((full.item, full.waiting, full.limit), (1, Rows(1), Rows(1)));
    assert_eq!(full.oldest_wait, Duration::from_secs(10));
    assert_eq!(clock.now() - start, Duration::from_secs(10));
    mailbox.take(Rows(1), ALL);
    assert!(mailbox.is_empty(), "who was late does not enter");
}

#[tokio::test(start_paused = true)]
async fn who_leaves_lets_the_next_one_in() {
    let (mailbox, clock) = (mailbox(3), TokioClock::system());
    push(&mailbox, &clock, 0, 2).await.unwrap();
    let mut big = Box::pin(push(&mailbox, &clock, 1, 2));
    let small = push(&mailbox, &clock, 2, 1);
    pin!(small);
    assert!(poll!(&mut big).is_pending());
    assert!(poll!(&mut small).is_pending(), "it would fit, but the big one came first");
    drop(big);
    assert!(poll!(&mut small).is_ready());
    assert_eq!(mailbox.take(Rows(9), ALL).batch, [0, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_waiting_item_is_as_old_as_its_wait() {
    let (mailbox, clock) = (mailbox(1), TokioClock::system());
    push(&mailbox, &clock, 0, 1).await.unwrap();
    let second = push(&mailbox, &clock, 1, 1);
    pin!(second);
    assert!(poll!(&mut second).is_pending());
    let since = clock.now();
    tokio::time::advance(Duration::from_secs(3)).await;
    mailbox.take(Rows(1), ALL);
    assert_eq!(mailbox.oldest(), Some(since));
}

#[tokio::test(start_paused = true)]
async fn dropping_unwanted_items_makes_room() {
    let (mailbox, clock) = (mailbox(2), TokioClock::system());
    push(&mailbox, &clock, 0, 1).await.unwrap();
    push(&mailbox, &clock, 7, 1).await.unwrap();
    let waiting = push(&mailbox, &clock, 1, 2);
    pin!(waiting);
    assert!(poll!(&mut waiting).is_pending());
    let taken = mailbox.take(Rows(1), |item| *item != 7);
    assert_eq!((taken.batch, taken.dropped), (vec![0], vec![7]));
    assert!(poll!(&mut waiting).is_ready());
}

#[tokio::test(start_paused = true)]
async fn closing_gives_waiting_items_back() {
    let (mailbox, clock) = (mailbox(1), TokioClock::system());
    push(&mailbox, &clock, 0, 1).await.unwrap();
    let waiting = push(&mailbox, &clock, 1, 1);
    pin!(waiting);
    assert!(poll!(&mut waiting).is_pending());
    assert_eq!(mailbox.close(), [0]);
    assert!(matches!(waiting.now_or_never(), Some(Err(PushError::Closed(closed))) if closed.0 == 1));
    assert!(matches!(push(&mailbox, &clock, 2, 1).await, Err(PushError::Closed(_))));
    assert!(mailbox.close().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_item_over_the_limit_enters_an_empty_mailbox_only() {
    let (mailbox, clock) = (mailbox(2), TokioClock::system());
    push(&mailbox, &clock, 0, 1).await.unwrap();
    let huge = push(&mailbox, &clock, 1, 100);
    pin!(huge);
    assert!(poll!(&mut huge).is_pending());
    assert_eq!(mailbox.take(Rows(1), ALL).batch, [0]);
    assert!(poll!(&mut huge).is_ready());
    assert_eq!(mailbox.waiting(), Rows(100));
    assert_eq!(mailbox.take(Rows(2), ALL).batch, [1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_item_and_no_wake_up_is_lost_between_threads() {
    let (mailbox, clock) = (Arc::new(mailbox(4)), TokioClock::system());
    let mut threads = JoinSet::new();
    for producer in 0..8 {
        let (mailbox, clock) = (mailbox.clone(), clock.clone());
        threads.spawn(async move {
            let items = (0..200).map(|item| push(&mailbox, &clock, producer * 200 + item, 1 + item % 3));
            join_all(items).await.into_iter().for_each(|pushed| pushed.expect("room within ten seconds"));
        });
    }
    let mut seen = Vec::new();
    while seen.len() < 1600 {
        seen.extend(mailbox.take(Rows(3), ALL).batch);
        tokio::task::yield_now().await;
    }
    while let Some(done) = threads.join_next().await {
        done.unwrap();
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..1600).collect::<Vec<_>>());
    assert!(mailbox.is_empty());
}

#[test]
fn a_question_that_panics_leaves_the_line_as_it_was() {
    let (mailbox, clock) = (mailbox(9), TokioClock::system());
    for item in 0..3 {
        mailbox.try_push(clock.now(), item, Rows(1), 1, Key(u64::from(item % 2))).unwrap();
    }
    let asked = contain(|| mailbox.take(Rows(9), |item| if *item == 1 { panic!("told to") } else { true }));
    assert!(asked.is_err());
    assert_eq!(mailbox.waiting(), Rows(3));
    assert_eq!(mailbox.take(Rows(9), ALL).batch, [0, 2]);
    assert_eq!(mailbox.take(Rows(9), ALL).batch, [1]);
}

#[tokio::test(start_paused = true)]
async fn an_item_that_panics_when_dropped_does_not_keep_the_others_from_their_end() {
    #[derive(Debug)]
    struct Fragile(bool);
    impl Drop for Fragile {
        fn drop(&mut self) {
            assert!(!self.0, "told to");
        }
    }
    let (mailbox, clock) = (BatchMailbox::new(Capacity { rows: Rows(1), bytes: 9 }), TokioClock::system());
    let push = |item| {
        let deadline = Deadline::after(clock.now(), Duration::from_secs(10));
        mailbox.push_when_room(&clock, deadline, item, Rows(1), 0, Key(0))
    };
    push(Fragile(false)).await.unwrap();
    let (mut first, second) = (Box::pin(push(Fragile(true))), push(Fragile(false)));
    pin!(second);
    assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
    assert!(contain(|| drop(first)).is_err(), "who leaves drops its item");
    assert_eq!(mailbox.close().len(), 1);
    assert!(matches!(second.await, Err(PushError::Closed(_))));
}
