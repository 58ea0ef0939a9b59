//! The guardian's loop: ends, commands and timers in, starts and stops out.

use std::{mem, sync::Arc};

use futures::future::OptionFuture;
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::{
    ChildSpec, ChildState, Command, Escalation, Factory, GuardianSpec, GuardianStatus, STOP_PATIENCE, Strategy,
    SuperviseError,
    children::{Child, Obituaries},
};
use crate::{
    Deadline, Exit, Follower, Moment, SharedClock, Signal, Tombstone,
    restart::{Decision, Restart, RestartLog},
    time::before,
};

pub(super) struct Watchman {
    spec: GuardianSpec,
    clock: SharedClock,
    log: RestartLog,
    /// In the order of their start.
    children: Vec<Child>,
    next_id: u64,
    obituaries: Arc<Obituaries>,
    publish: Signal<GuardianStatus>,
    escalation: Option<Escalation>,
    /// Children that outlive their guardian.
    still_running: Vec<String>,
    tombstone: Tombstone,
}

/// Why the loop went on.
enum Event {
    News,
    PleaseStop,
    Command(Command),
    Wake,
}

impl Watchman {
    pub fn new(spec: GuardianSpec, clock: SharedClock, publish: Signal<GuardianStatus>, tombstone: Tombstone) -> Self {
        let log = RestartLog::new(spec.intensity, spec.seed);
        Self {
            spec,
            clock,
            log,
            children: Vec::new(),
            next_id: 0,
            obituaries: Arc::default(),
            publish,
            escalation: None,
            still_running: Vec::new(),
            tombstone,
        }
    }

    /// Until it is stopped or gives up.
    pub async fn watch(mut self, mut commands: mpsc::Receiver<Command>, please_stop: Follower<bool>) {
        let mut deadline = None;
        while self.escalation.is_none() {
            match self.next_event(&mut commands, &please_stop).await {
                Event::News => self.bury_the_dead().await,
                Event::Wake => self.wake(),
                Event::Command(Command::Supervise { spec, factory, taken }) => {
                    let _asker_left = taken.send(self.supervise(spec, factory));
                }
                Event::Command(Command::Stop { deadline: at }) => {
                    deadline = Some(at);
                    break;
                }
                Event::PleaseStop => break,
            }
            self.publish(false);
        }
        let deadline = deadline.unwrap_or_else(|| Deadline::after(self.clock.now(), STOP_PATIENCE));
        self.end(deadline).await;
    }

    async fn next_event(&self, commands: &mut mpsc::Receiver<Command>, please_stop: &Follower<bool>) -> Event {
        let next_wake = self.children.iter().filter_map(wake_at).min();
        let alarm = OptionFuture::from(next_wake.map(|at| self.clock.sleep_until(at)));
        tokio::select! {
            biased;
            () = self.obituaries.news() => Event::News,
            () = please_stop.until(|stop| stop.then_some(())) => Event::PleaseStop,
            command = commands.recv() => command.map_or(Event::PleaseStop, Event::Command),
            Some(()) = alarm => Event::Wake,
        }
    }

    fn supervise(&mut self, spec: ChildSpec, factory: Factory) -> Result<(), SuperviseError> {
        if self.children.iter().any(|child| child.spec.name == spec.name && !child.is_over()) {
            return Err(SuperviseError::NameTaken { guardian: self.spec.name.clone(), name: spec.name });
        }
        self.children.retain(|child| child.spec.name != spec.name);
        self.next_id += 1;
        let mut child = Child::new(self.next_id, spec, factory);
        // One that comes while an earlier one is down waits for it.
        let one_is_down = self.children.iter().any(|earlier| !earlier.is_running() && !earlier.is_over());
        if self.spec.strategy == Strategy::OneForOne || !one_is_down {
            child.start(self.clock.now(), &self.obituaries);
        }
        self.children.push(child);
        Ok(())
    }

    async fn bury_the_dead(&mut self) {
        while let Some(obituary) = self.obituaries.next() {
            let Some(index) = self.children.iter().position(|child| child.id == obituary.child) else { continue };
            if self.children[index].bury(obituary) {
                self.on_exit(index).await;
            }
            if self.escalation.is_some() {
                return;
            }
        }
    }

    async fn on_exit(&mut self, index: usize) {
        let now = self.clock.now();
        let child = &mut self.children[index];
        let exit = child.last_exit.clone().expect("a buried child has an exit");
        match self.log.on_exit(now, &mut child.history, &exit) {
            Decision::Forget => {
                info!(guardian = %self.spec.name, child = %child.spec.name, ?exit, "child ended");
                child.state = ChildState::Stopped;
                if child.spec.restart == Restart::Temporary {
                    self.children.remove(index);
                }
            }
            Decision::Restart { after } => {
                warn!(guardian = %self.spec.name, child = %child.spec.name, ?exit, ?after, "child ended; restarting");
                child.state = ChildState::Backoff { until: now + after };
                if self.spec.strategy == Strategy::RestForOne {
                    self.pause_those_after(index).await;
                }
            }
            Decision::Escalate => self.escalate(index, exit),
        }
    }

    /// Stops the children that were started after this one; they start again after it.
    async fn pause_those_after(&mut self, index: usize) {
        let id = self.children[index].id;
        self.publish(false);
        let deadline = Deadline::after(self.clock.now(), STOP_PATIENCE);
        self.stop_from(index + 1, deadline).await;
        if let Some(stuck) = (index + 1..self.children.len()).find(|later| self.children[*later].is_running()) {
            // Starting beside one that still runs would break what the strategy promises.
            self.escalate(stuck, Exit::Failed("did not stop".into()));
            return;
        }
        self.children.retain(|child| child.id <= id || child.spec.restart != Restart::Temporary);
        for child in &mut self.children[index + 1..] {
            if !child.is_over() {
                child.state = ChildState::Waiting;
            }
        }
    }

    fn escalate(&mut self, index: usize, exit: Exit) {
        let child = &mut self.children[index];
        child.state = ChildState::Escalated;
        let escalation = Escalation { guardian: self.spec.name.clone(), child: child.spec.name.clone(), exit };
        error!(guardian = %escalation.guardian, child = %escalation.child, exit = ?escalation.exit, "giving up");
        self.escalation = Some(escalation);
    }

    /// Starts whoever is due, and after it those who waited for it.
    fn wake(&mut self) {
        let now = self.clock.now();
        let rest_for_one = self.spec.strategy == Strategy::RestForOne;
        for child in &mut self.children {
            let due = wake_at(child).is_some_and(|at| at <= now) || child.state == ChildState::Waiting;
            if due {
                info!(guardian = %self.spec.name, child = %child.spec.name, "starting again");
                child.start(now, &self.obituaries);
            }
            if rest_for_one && !child.is_running() && !child.is_over() {
                break;
            }
        }
    }

    /// Asks the children from `first` on to stop, the last one first, each after the one behind it has ended. What ends
    /// meanwhile before `first` is left to be buried.
    async fn stop_from(&mut self, first: usize, deadline: Deadline) {
        let mut others = Vec::new();
        for index in (first..self.children.len()).rev() {
            self.children[index].ask_to_stop();
            while self.children[index].is_running() {
                while let Some(obituary) = self.obituaries.next() {
                    match self.children[first..].iter_mut().find(|child| child.id == obituary.child) {
                        Some(child) => {
                            child.bury(obituary);
                        }
                        None => others.push(obituary),
                    }
                }
                if !self.children[index].is_running() {
                    break;
                }
                if before(&*self.clock, deadline, self.obituaries.news()).await.is_err() {
                    // Late: those that remain get no more time, but are asked all the same.
                    break;
                }
            }
        }
        others.into_iter().for_each(|obituary| self.obituaries.report(obituary));
    }

    async fn end(mut self, deadline: Deadline) {
        self.publish(false);
        self.stop_from(0, deadline).await;
        for child in &mut self.children {
            if child.is_running() {
                self.still_running.push(child.spec.name.clone());
            } else if child.state != ChildState::Escalated {
                child.state = ChildState::Stopped;
            }
        }
        if !self.still_running.is_empty() {
            error!(guardian = %self.spec.name, still_running = ?self.still_running, "children outlive their guardian");
        }
        self.tombstone.write(match &self.escalation {
            Some(escalation) => Exit::Failed(escalation.to_string()),
            None => Exit::Stopped,
        });
        self.publish(true);
    }

    fn publish(&self, ended: bool) {
        let children = self.children.iter().map(Child::status).collect();
        let (escalation, still_running) = (self.escalation.clone(), self.still_running.clone());
        let status = GuardianStatus { children, escalation, ended, still_running };
        self.publish.update_if(|published| mem::replace(published, status.clone()) != status);
    }
}

impl Drop for Watchman {
    /// A system that ends takes its guardians along; whoever waits for one hears of it.
    fn drop(&mut self) {
        self.publish.update_if(|status| !mem::replace(&mut status.ended, true));
    }
}

fn wake_at(child: &Child) -> Option<Moment> {
    match child.state {
        ChildState::Backoff { until } => Some(until),
        _ => None,
    }
}
