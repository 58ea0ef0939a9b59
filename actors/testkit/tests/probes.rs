//! Probes stand for actors; the pure cores need no harness at all.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use actix::{Actor, ActorContext, Context, Handler, Message};
use skep_kernel::{Inbox, Stop};
use skep_testkit::{Probe, Sim};

#[derive(Debug, PartialEq)]
struct Count(u32);

impl Message for Count {
    type Result = ();
}

/// Counts aloud every second, up to three.
struct Counter {
    listener: actix::Recipient<Count>,
    clock: skep_kernel::SharedClock,
}

impl Actor for Counter {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        use actix::{ActorFutureExt, AsyncContext, WrapFuture};
        let (listener, clock) = (self.listener.clone(), self.clock.clone());
        let counting = async move {
            for count in 1..=3 {
                clock.sleep_until(clock.now() + Duration::from_secs(1)).await;
                listener.try_send(Count(count)).unwrap();
            }
        };
        ctx.spawn(counting.into_actor(self).map(|(), _, ctx| ctx.stop()));
    }
}

impl Handler<Stop> for Counter {
    type Result = ();

    fn handle(&mut self, _: Stop, ctx: &mut Context<Self>) {
        ctx.stop();
    }
}

#[test]
fn a_probe_hears_what_an_actor_says_and_when_it_ends() {
    Sim::with_seed(1).run(|sim| async move {
        let probe: Probe<Count> = sim.probe();
        let start = sim.now();
        let counter = Counter { listener: probe.addr().recipient(), clock: sim.clock() }.start();
        assert_eq!(probe.expect().await, Count(1));
        assert_eq!(sim.now() - start, Duration::from_secs(1));
        probe.expect_none(Duration::from_millis(900)).await;
        assert_eq!(probe.fish(|count| count.0 == 3).await, Count(3));
        probe.within(Duration::from_millis(10)).expect_terminated(&counter).await;
    });
}

#[test]
fn a_probe_reads_an_inbox_in_the_place_of_its_actor() {
    Sim::with_seed(1).run(|sim| async move {
        let (probe, inbox) = (sim.probe::<u32>(), Inbox::bounded(4));
        sim.spawner().spawn(probe.read(inbox.clone()));
        inbox.tell(7).unwrap();
        assert_eq!(probe.expect().await, 7);
        inbox.close();
    });
}

/// The message with which a test of a probe fails.
fn failure<F: Future<Output = ()>>(test: impl Fn(Sim) -> F) -> String {
    let panic = catch_unwind(AssertUnwindSafe(|| Sim::with_seed(1).run(test))).expect_err("it fails");
    panic.downcast_ref::<String>().cloned().unwrap()
}

#[test]
fn a_probe_that_is_disappointed_says_what_it_was_told_instead() {
    let text = failure(|sim| async move {
        sim.probe::<u32>().within(Duration::from_secs(5)).expect().await;
    });
    assert_eq!(text, "a probe was told nothing within 5s");
    let text = failure(|sim| async move {
        let probe = sim.probe();
        probe.tell(7);
        probe.expect_none(Duration::from_secs(5)).await;
    });
    assert_eq!(text, "a probe was told 7, where nothing was expected for 5s");
    let text = failure(|sim| async move {
        let probe = sim.probe();
        [1, 2].into_iter().for_each(|n| probe.tell(n));
        probe.fish(|n| *n > 2).await;
    });
    assert_eq!(text, "a probe was not told what it fished for within 3s, but [1, 2]");
}

#[test]
fn an_actor_that_does_not_end_in_time_fails_its_probe() {
    let text = failure(|sim| async move {
        let probe: Probe<Count> = sim.probe();
        let counter = sim.start_actor(Counter { listener: probe.addr().recipient(), clock: sim.clock() });
        probe.within(Duration::from_secs(2)).expect_terminated(&counter).await;
    });
    assert_eq!(text, "an actor still lives after 2s");
}
