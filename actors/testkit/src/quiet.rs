//! Nothing must be left: [`Sim::assert_quiet`].

use std::time::Duration;

use skep_kernel::{Deadline, time::before};

use crate::Sim;

/// Virtual time that nodes have to stop.
const STOPPING: Duration = Duration::from_secs(30);
/// Pauses after which what is left is looked at again. What runs in the background ends by a deadline of its own.
const PAUSES: [u64; 6] = [1, 10, 100, 1_000, 10_000, 60_000];

impl Sim {
    /// Stops every node that the simulation started, as its user would, and fails when anything is left then: an actor, a
    /// task, a timer, a call under way, a row in line. Nodes that hang or were killed end at once. What ends by a deadline
    /// of its own has 70 s of virtual time for it.
    ///
    /// [`Setup::run`](crate::Setup::run) does the same after the test, and there it also sees actors that the test
    /// started outside of all nodes.
    ///
    /// # Panics
    /// When something is left; the message says what, and where it was started.
    pub async fn assert_quiet(&self) {
        let left = self.settle().await;
        assert!(left.is_empty(), "{}", describe(&left));
    }

    /// Stops all nodes; what is left.
    pub(crate) async fn settle(&self) -> Vec<String> {
        while let Some(ending) = self.next_ending() {
            let in_time = before(&*self.clock(), Deadline::after(self.now(), STOPPING), ending).await;
            assert!(in_time.is_ok(), "what Sim::at_end was given is not done after {STOPPING:?}");
        }
        let deadline = Deadline::after(self.now(), STOPPING);
        let nodes = self.nodes();
        let stops = nodes.iter().map(|node| async move {
            let stopped = node.stop(deadline).await;
            stopped.err().map(|error| format!("{}, started at {}: {error}", node.name(), node.started_at()))
        });
        let late: Vec<String> = futures::future::join_all(stops).await.into_iter().flatten().collect();
        for node in nodes.iter().filter(|node| node.health() != crate::Health::Stopped) {
            node.end();
        }
        let mut left = Vec::new();
        for pause in PAUSES {
            self.advance(Duration::from_millis(pause)).await;
            left = self.left();
            if left.is_empty() {
                break;
            }
        }
        left.extend(late);
        left
    }

    /// What lives now.
    fn left(&self) -> Vec<String> {
        let mut left: Vec<String> = self.nodes().iter().filter_map(crate::Node::remains).collect();
        left.extend(self.tasks().iter().map(|place| format!("a task of the test, started at {place}")));
        left.extend(self.actors());
        left.extend(self.waits());
        let (calls, serving) = (self.network().in_flight(), self.network().serving());
        if serving > calls {
            left.push(format!("{} calls that are served although their callers have left", serving - calls));
        }
        left
    }

    /// Who waits for whom.
    pub(crate) fn waits(&self) -> Vec<String> {
        let (network, now) = (self.network(), self.now());
        let calls = network.calls_under_way().into_iter().map(|call| {
            let (from, to) = (network.number(call.from), network.number(call.to));
            format!("node {from} waits since {:?} for {} of node {to}", now - call.since, call.method)
        });
        calls.collect()
    }
}

/// The message of a leak.
pub(crate) fn describe(left: &[String]) -> String {
    let advice =
        "Stop what the test starts by hand, for instance in Sim::at_end, or say Sim::with_seed(…).allow_leaks().";
    format!("the simulation is not quiet; alive are\n  {}\n{advice}", left.join("\n  "))
}
