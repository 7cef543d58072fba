//! The store on both databases: each claim runs on SQLite and on a real Postgres.

#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of it is tests, which clippy sees only in the functions that bear the attribute"
)]

mod access;
mod artifacts;
mod conflicts;
mod connections;
mod database;
mod enrolment;
mod fires;
mod held;
mod history;
mod keys;
mod locks;
mod model;
mod operations;
mod power_off;
mod recorded;
mod reports;
mod rollouts;
mod rounds;
mod schedules;
mod sessions;
mod silence;
mod storage;
mod support;
mod torn;
mod trap;
mod windows;

/// Defines a test on each database for each claim.
macro_rules! on_both {
    ($($part:ident: $($claim:ident),+;)+) => {
        // The databases differ in locking and in types, so a claim that holds on one may fail on the other.
        mod on_sqlite { $(mod $part { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $claim() { crate::$part::$claim(crate::support::sqlite().await).await; }
        )+ })+ }
        mod on_postgres { $(mod $part { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $claim() { crate::$part::$claim(crate::support::postgres().await).await; }
        )+ })+ }
    };
}

on_both!(
    operations:
        an_operation_is_read_back_as_it_was_stored,
        the_same_request_makes_one_operation,
        concurrent_requests_with_one_id_make_one_operation,
        pages_of_operations_are_newest_first_without_gaps,
        a_claim_takes_the_first_due_execution_of_each_free_node,
        a_node_has_one_active_execution_whoever_claims,
        nothing_is_claimed_for_a_session_that_is_not_held,
        an_installer_takes_only_an_update_with_an_image,
        a_held_node_gets_no_work_and_is_told_so,
        a_scheduled_operation_begins_when_due_and_expires_later,
        a_cancelled_operation_is_never_assigned,
        a_cancel_is_asked_of_the_node_until_it_answers,
        a_paused_operation_assigns_nothing_until_resumed,
        an_operation_ends_with_its_last_execution,
        events_are_numbered_without_gaps,
        everything_at_once_neither_locks_up_nor_loses_anything;
    reports:
        a_reboot_succeeds_only_with_a_new_boot_id,
        an_update_is_accepted_only_when_the_release_is_right,
        a_report_that_was_stored_is_acknowledged_again_and_changes_nothing,
        a_report_of_another_delivery_is_answered_by_an_assignment,
        a_node_brings_about_a_thousand_deliveries_of_an_execution_at_most,
        a_node_declines_an_execution_a_thousand_times_at_most,
        reports_of_an_earlier_delivery_get_one_and_the_same,
        a_report_under_a_lost_session_changes_nothing,
        an_assignment_that_never_arrived_is_given_again,
        an_assignment_is_never_taken_back_by_time,
        an_accepted_execution_that_the_node_forgot_fails,
        a_hello_after_the_reboot_verifies_and_the_report_ends_it,
        progress_is_kept_and_holds_off_the_deadline,
        a_phase_has_its_own_time_and_only_a_byte_that_moves_is_a_sign_of_life,
        phases_that_come_round_again_are_no_sign_of_life,
        progress_of_an_earlier_state_is_ignored,
        what_a_node_logged_is_kept_once_and_only_of_what_did_not_succeed,
        an_overdue_execution_can_be_abandoned_and_a_late_truth_still_counts,
        execution_of_a_node_in_its_installer_can_always_be_abandoned,
        what_ended_during_an_outage_is_called_off,
        a_node_that_is_overdue_for_a_day_is_given_up;
    torn:
        torn_journal_gets_its_verdict_once_that_is_stored,
        torn_journal_gets_no_verdict_without_proof,
        end_told_from_a_torn_journal_is_the_end,
        step_told_from_a_torn_journal_takes_nothing_back,
        step_of_a_journal_that_says_it_was_torn_is_believed,
        assignment_that_a_lost_journal_may_have_held_is_not_given_again,
        older_copy_does_not_dispute_the_end_that_the_whole_one_told;
    power_off:
        goodbye_and_sixty_silent_seconds_prove_it,
        broken_stream_proves_nothing,
        returning_node_is_told_by_its_boot_id,
        contradiction_of_an_end_is_kept_and_shown,
        work_on_what_has_ended_is_kept_and_shown;
    conflicts:
        later_delivery_is_taken_as_the_node_says,
        lost_assignment_that_was_done_succeeds,
        settled_execution_that_the_store_lost_is_asked_for,
        absurd_attempt_is_held_for_an_operator,
        abandoned_conflict_ends_failed_and_is_cancelled,
        unknown_execution_is_shown_and_keeps_a_busy_node_free,
        refused_assignment_waits_for_what_the_node_is_at,
        conflicts_of_a_node_are_bounded,
        broken_record_fails_alone,
        unreadable_rollout_holds_up_no_other,
        unreadable_action_keeps_no_assignment_and_no_progress,
        repeated_state_writes_no_event,
        late_cancel_is_kept_when_it_comes_as_progress,
        execution_of_a_deleted_node_ends_at_once;
    schedules:
        a_schedule_is_read_back_as_it_was_stored,
        each_of_500_instants_fires_once_however_many_schedulers_race,
        instants_that_are_found_too_late_are_each_a_row,
        a_long_outage_is_summed_up_after_a_thousand_rows,
        an_unfinished_operation_is_not_overtaken,
        what_queues_is_done_one_after_another_in_the_order_of_its_instants,
        a_change_that_saw_less_than_the_scheduler_decided_is_refused,
        a_paused_schedule_skips_and_says_so,
        a_template_that_cannot_be_carried_out_is_a_skip_with_the_reason,
        a_node_begins_after_its_own_share_of_the_jitter;
    fires:
        panic_of_one_schedule_pauses_it_and_stops_no_other,
        failures_that_do_not_follow_each_other_pause_nothing,
        unreadable_schedule_is_paused_with_the_reason,
        row_that_nobody_can_read_holds_up_no_other,
        day_without_a_controller_ends_in_one_round_for_each_policy,
        window_that_never_opens_stops_no_round,
        lost_instant_makes_the_same_operation_again,
        coming_instants_follow_new_rules,
        operations_are_listed_by_when_they_were_made;
    rollouts:
        a_hundred_nodes_ten_at_once_pause_when_too_many_fail,
        several_controllers_never_exceed_the_limit,
        an_overdue_node_holds_no_slot_and_counts_as_failed,
        a_node_without_a_stream_holds_no_slot,
        never_more_than_the_limit_of_a_group_at_once,
        the_rest_waits_for_the_canaries,
        a_reboot_of_all_nodes_does_not_pause_itself,
        it_pauses_when_a_third_of_the_targets_vanish,
        who_was_away_at_the_start_does_not_vanish,
        nobody_vanished_while_the_controller_was_stopped,
        nodes_that_were_powered_off_did_not_vanish,
        without_a_rollout_nothing_pauses,
        an_operation_without_room_keeps_a_node_from_nothing_else,
        an_abandoned_node_stays_a_failure,
        a_forgiven_node_that_succeeds_leaves_no_room_for_failures,
        a_late_node_that_was_forgiven_leaves_no_room,
        a_forgiven_node_that_fails_in_the_end_is_not_counted_twice,
        a_forgiven_node_that_is_at_work_again_can_fail_again;
    silence:
        nobody_is_judged_in_the_first_round_after_an_outage,
        nothing_that_was_about_to_end_ends_with_an_outage,
        a_node_has_its_day_from_when_it_was_found_overdue,
        nobody_is_judged_while_a_report_waits,
        other_controllers_get_the_time_to_beat_again;
    rounds:
        an_overdue_node_is_asked_what_became_of_it,
        a_sweep_cancels_what_waits_for_a_deleted_node;
    windows:
        nothing_is_begun_while_the_window_is_closed,
        what_was_not_begun_in_a_window_waits_for_the_next,
        a_window_that_never_opens_promises_nothing;
    sessions:
        a_second_session_ends_the_first,
        a_session_is_lost_to_a_later_one_of_its_node,
        two_nodes_with_one_identity_are_quarantined,
        hello_that_is_read_late_takes_no_session_from_a_later_start,
        two_agents_of_one_boot_are_told_apart_by_their_starts,
        a_card_in_another_board_waits_for_approval,
        sessions_of_a_dead_controller_end,
        what_was_assigned_and_not_answered_is_found_by_its_controller,
        a_fleet_that_comes_back_at_once_is_served,
        nodes_are_found_by_label,
        a_node_with_work_is_deleted_only_by_force;
    enrolment:
        a_token_is_used_at_most_as_often_as_it_says,
        concurrent_enrolments_never_use_a_token_too_often,
        a_lost_answer_to_an_enrolment_costs_no_second_use,
        ids_that_are_taken_get_a_suffix,
        a_revoked_or_expired_token_is_refused,
        a_certificate_that_was_not_issued_leaves_nothing;
    keys:
        a_new_key_of_a_known_board_changes_nothing_until_it_is_approved,
        a_token_that_names_the_node_or_the_serial_approves_the_key,
        a_node_with_one_key_that_waits_needs_no_fingerprint,
        no_more_keys_wait_than_an_admin_can_look_at,
        a_node_is_renewed_once_in_an_hour_and_the_same_request_gets_the_same_answer,
        a_certificate_that_is_not_valid_yet_is_replaced_at_once,
        both_keys_of_a_renewal_serve_until_the_new_one_was_used,
        a_previous_key_that_asks_for_a_renewal_is_held,
        revoking_a_certificate_shuts_its_key_out,
        old_certificates_are_forgotten,
        names_of_users_and_of_the_controller_and_other_cases_are_refused,
        what_expires_in_14_days_is_told_once;
    artifacts:
        a_name_moves_to_other_bytes,
        what_an_unfinished_operation_needs_is_not_removed,
        defaults_are_by_board_with_one_for_any,
        node_gets_the_bytes_of_its_work_and_its_defaults,
        opened_name_stays_open_until_it_becomes_something_else;
    access:
        a_user_is_what_the_store_says_until_it_is_shut_out,
        a_revoked_certificate_is_not_renewed,
        a_certificate_that_is_seen_while_its_user_is_shut_out_is_out_with_it,
        renewals_and_the_deletion_of_a_node_wait_for_each_other,
        an_api_token_works_until_it_expires_or_is_revoked,
        a_node_outside_the_scope_is_neither_shown_nor_given_its_part;
    history:
        events_of_operations_that_ended_long_ago_are_removed_and_the_operations_kept,
        races_of_cancel_against_dispatch_and_completion_end_as_the_node_says;
    locks:
        progress_cancels_and_resumes_of_one_operation_wait_for_each_other;
    recorded:
        a_change_that_cannot_be_recorded_is_not_made,
        what_was_not_done_is_not_recorded_as_done,
        what_the_controller_does_by_itself_is_recorded_with_it;
    database:
        a_database_is_opened_again_with_everything_in_it,
        a_call_is_audited,
        a_change_is_hinted;
);
