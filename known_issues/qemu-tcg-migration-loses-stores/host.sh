#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Migrate a machine while it stores to its memory, and look for the stores after the restore.
. "$(dirname "$0")/../lib.sh"

migrate() {
	await '^ready' out
	# Both make QEMU send pages again while the program runs.
	echo migrate_set_parameter downtime-limit 1
	echo migrate_set_parameter max-bandwidth 1M
	echo 'migrate -d "exec:cat > state"'
	# The program's pages have been sent twice.
	progress 'dirty.sync[^0-9]*([3-9]|[0-9]{2})'
	echo stop
	progress '^(Migration status|Status):[[:space:]]*completed'
	echo quit
}

expected "after the restore, each page has the last store of the program"
steps=migrate
bare rounds
saved
! grep -q lost out || unknown "the program ended before the machine was saved"
steps=resume
bare rounds -incoming 'exec:cat state'
case $(tail -n 1 out) in
"lost: "*) shown "$(sed -n 's/^lost: //p' out)" ;;
"nothing lost "*) gone "$(tail -n 1 out)" ;;
esac
unknown "QEMU exits with status $status: $message"
