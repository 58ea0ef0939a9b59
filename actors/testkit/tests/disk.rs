//! A server's disk survives its process; its faults are what a server sees of a bad disk.

use std::time::Duration;

use skep_kernel::Deadline;
use skep_moe::RemoteExpert;
use skep_testkit::{Hive, ScriptedBackend, Sim};
use skep_wire::{ExpertUid, HostTensor};

fn within(sim: &Sim, seconds: u64) -> Deadline {
    Deadline::after(sim.now(), Duration::from_secs(seconds))
}

fn one() -> Vec<HostTensor> {
    vec![HostTensor::from_f32([1, 1], &[1.0]).unwrap()]
}

fn uid() -> ExpertUid {
    "m.0".parse().unwrap()
}

/// A server whose expert weighs 10 and loses 1 with each step of ones.
async fn start(sim: &Sim) -> (Hive, RemoteExpert) {
    let backend = ScriptedBackend::affine(10.0, 1.0);
    let hive = sim.servers(1).experts("m.0").backend(backend).with_checkpoints().start().await;
    let client = sim.client(&hive).await;
    let expert = RemoteExpert::find(&client, &uid(), within(sim, 5)).await.unwrap().unwrap();
    (hive, expert)
}

async fn train(sim: &Sim, expert: &RemoteExpert) {
    expert.backward(one(), one(), within(sim, 5)).await.unwrap();
}

async fn bounce(sim: &Sim, hive: &Hive) {
    hive.nodes().bounce();
    hive.servers()[0].server().ready(within(sim, 60)).await.unwrap();
}

async fn weight(sim: &Sim, expert: &RemoteExpert) -> f32 {
    expert.forward(one(), within(sim, 5)).await.unwrap()[0].to_f32().unwrap()[0]
}

#[test]
fn a_bounced_server_goes_on_from_its_last_checkpoint() {
    Sim::with_seed(1).run(|sim| async move {
        let (hive, expert) = start(&sim).await;
        train(&sim, &expert).await;
        sim.advance(Duration::from_secs(600)).await;
        train(&sim, &expert).await;
        bounce(&sim, &hive).await;
        assert_eq!(weight(&sim, &expert).await, 9.0, "what came after the checkpoint is lost");
    });
}

#[test]
fn a_torn_checkpoint_is_passed_over_for_the_one_before() {
    Sim::with_seed(2).run(|sim| async move {
        let (hive, expert) = start(&sim).await;
        let disk = hive.servers()[0].disk().unwrap().clone();
        train(&sim, &expert).await;
        sim.advance(Duration::from_secs(600)).await;
        let whole = disk.checkpoints(&uid());
        disk.tear();
        train(&sim, &expert).await;
        sim.advance(Duration::from_secs(600)).await;
        assert!(disk.checkpoints(&uid())[0] > whole[0]);
        bounce(&sim, &hive).await;
        assert_eq!(weight(&sim, &expert).await, 9.0);
    });
}

#[test]
fn a_full_or_broken_disk_keeps_nobody_from_serving() {
    Sim::with_seed(3).run(|sim| async move {
        let (hive, expert) = start(&sim).await;
        let disk = hive.servers()[0].disk().unwrap().clone();
        let before = disk.checkpoints(&uid());
        for break_it in [skep_testkit::SimDisk::fill, skep_testkit::SimDisk::fail] {
            break_it(&disk);
            train(&sim, &expert).await;
            sim.advance(Duration::from_secs(600)).await;
            assert_eq!(disk.checkpoints(&uid()), before);
        }
        disk.mend();
        sim.advance(Duration::from_secs(600)).await;
        assert!(disk.checkpoints(&uid()).len() > before.len(), "it is written once there is room");
        assert_eq!(weight(&sim, &expert).await, 8.0);
    });
}
