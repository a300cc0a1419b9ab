package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/nbd-tool/internal/control"
)

// ctlOptions are the flags of ctl.
type ctlOptions struct{ pivot, stop, verify, json bool }

func newCtlCommand() *cobra.Command {
	var o ctlOptions
	cmd := &cobra.Command{
		Use:   "ctl [flags] PATH {" + strings.Join(control.Commands, " | ") + "}",
		Short: "Control a running mirror",
		Long: `Control an "nbd-tool mirror" through its socket at PATH, which --control has made. Only
root and the user of the mirror can. Several controllers may be connected at once.

Commands:
  status    shows the state, the mode, how much is still to be copied, the rate, whether and
            when both ends will be equal, and the last error
  wait      waits until both ends are equal. Fails if the mirror ends before that without
            having been completed
  pause     stops the copy. Writes of clients go on, and are copied later
  resume    continues it
  complete  waits until little is left, then holds writes, copies the rest, flushes both ends,
            and with --verify reads and compares them. Then with
            --pivot  clients are served by SECONDARY. PRIMARY is not touched any more
            --stop   clients are disconnected, and the mirror exits
            If it fails, writes go on as before, and if the ends differ everything is
            copied again. Clients wait for the whole comparison of
            --verify. Interrupting "ctl" does not interrupt it
  cancel    ends the mirror: clients are served on by PRIMARY, and SECONDARY is incomplete

All but "wait" and "complete" are answered at once.

States: "copying" everything in the background, "mirroring" (writes go to both ends, the rest
is copied), "in sync" (both ends are equal), "completing"; "pivoted" and "stopped", when
SECONDARY is complete; "cancelled", "detached" (SECONDARY has failed, clients are served
on) and "failed" (the same, further writes are refused), when it is not.

The protocol: a request is a JSON object on a line, {"command": "complete", "then": "pivot",
"verify": true}; then, which is pivot or stop, and verify belong to complete. The reply is
one too, {"ok": true, "status": {…}} or {"ok": false, "error": "…", "status": {…}}, with the
fields that --json prints. A connection may send further requests after a reply. A
"wait" is withdrawn when its connection is closed.

Exit codes: 0 done; 1 the command has failed, no mirror answers, or the state it is in does
not allow the command; 2 usage.`,
		Example: `  nbd-tool ctl /run/mirror.ctl status --json
  nbd-tool ctl /run/mirror.ctl wait && nbd-tool ctl /run/mirror.ctl complete --pivot`,
		DisableFlagsInUseLine: true,
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return control.Commands, cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveDefault
		},
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 || !slices.Contains(control.Commands, args[1]) {
				return usagef("want PATH and one of %s", strings.Join(control.Commands, ", "))
			}
			return o.check(args[1])
		},
		RunE: action(func(cmd *cobra.Command, args []string) error {
			return o.run(cmd.Context(), cmd.OutOrStdout(), strings.TrimPrefix(args[0], "unix:"), args[1])
		}),
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVar(&o.json, "json", false, "print the state as JSON, after every command")
	f.BoolVar(&o.pivot, "pivot", false, "complete: serve clients from SECONDARY")
	f.BoolVar(&o.stop, "stop", false, "complete: disconnect clients and end the mirror")
	f.BoolVar(&o.verify, "verify", false, "complete: read both ends and compare them first")
	return cmd
}

// check returns a usage error for flags that do not fit the command.
func (o *ctlOptions) check(command string) error {
	switch {
	case command != control.CommandComplete && (o.pivot || o.stop || o.verify):
		return usagef("--pivot, --stop and --verify belong to complete")
	case command == control.CommandComplete && o.pivot == o.stop:
		return usagef("complete needs --pivot or --stop")
	}
	return nil
}

// run sends the command to the mirror at path, and prints its state if that was asked for.
func (o *ctlOptions) run(ctx context.Context, out io.Writer, path, command string) error {
	r := control.Request{Command: command, Verify: o.verify}
	switch {
	case o.pivot:
		r.Then = control.ThenPivot
	case o.stop:
		r.Then = control.ThenStop
	}
	reply, err := control.Call(ctx, path, r)
	if err != nil {
		return fmt.Errorf("no mirror answers: %w", err)
	}
	if reply.Status != nil {
		switch {
		case o.json:
			err = printJSON(out, reply.Status)
		case command == control.CommandStatus:
			err = printStatus(out, reply.Status)
		}
	}
	if !reply.OK {
		return errors.Join(fmt.Errorf("%s: %s", command, printable(reply.Error)), err)
	}
	return err
}

// printStatus writes a status for people, with one Write.
func printStatus(out io.Writer, s *control.Status) error {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t"+format+"\n", append([]any{name}, args...)...)
	}
	state := s.State
	if s.Paused {
		state += ", paused"
	}
	row("state", "%s", state)
	if !s.Ended {
		row("writes", "%s", map[string]string{
			"background": "do not wait for the secondary", "blocking": "are answered when both ends have them",
		}[s.Mode])
	}
	row("clients", "are served by the %s", s.Serving)
	row("size", "%s", quantity(s.Size))
	row("equal", "%.1f %%", s.Percent)
	row("to be copied", "%s", quantity(s.Dirty))
	row("copied", "%s", quantity(s.Copied))
	if !s.Ended {
		row("rate", "%.1f MiB/s", float64(s.Rate)/(1<<20))
		row("converges", "%s", convergence(s))
	}
	if s.Stalls > 0 {
		row("stalls", "%d", s.Stalls)
	}
	if s.Losses > 0 {
		row("connections lost or made again", "%d", s.Losses)
	}
	if s.LastError != "" {
		row("last error", "%s", s.LastError)
	}
	complete := "no: it is no copy of the primary yet"
	switch {
	case s.Complete:
		complete = "yes"
	case s.Ended:
		complete = "no: it is no copy of the primary"
	}
	row("secondary complete", "%s", complete)
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := io.WriteString(out, text.String())
	return err
}

// convergence says whether and when both ends will be equal.
func convergence(s *control.Status) string {
	switch {
	case s.Dirty == 0:
		return "both ends are equal, or are about to be"
	case s.Paused:
		return "no, it is paused"
	case !s.Converges:
		return "not yet: clients write as fast as the copy runs"
	case s.SecondsLeft == nil:
		return "yes"
	}
	return fmt.Sprintf("yes, in about %v", max(time.Duration(*s.SecondsLeft)*time.Second, time.Second))
}
