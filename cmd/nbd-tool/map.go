package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// mapExtent is an extent in the output of map --json; its keys are stable.
type mapExtent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
	Hole   bool  `json:"hole"`
	Zero   bool  `json:"zero"`
}

// mapTotals are the bytes in each state.
type mapTotals struct {
	Data     int64 `json:"data"`
	Hole     int64 `json:"hole"`
	Zero     int64 `json:"zero"`
	HoleZero int64 `json:"hole_zero"`
}

// contextExtent is mapExtent for contexts other than base:allocation.
type contextExtent struct {
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Status uint64 `json:"status"`
	State  string `json:"state"`
}

// contextMap is a metadata context of an export.
type contextMap struct {
	conn *client.Conn
	name string
}

func newMapCommand() *cobra.Command {
	var asJSON bool
	name := wire.BaseAllocation
	cmd := &cobra.Command{
		Use:   "map",
		Short: "Show which parts of an export are data, holes and zeroes, or have changed",
		Long: `Show the extents of an export in a metadata context: offset, length and state, then
how many bytes are in each state.

base:allocation          data, hole (no storage allocated), zero, or hole,zero. Only
                         states with zero are certain to read as zeroes
x-xapi:unchanged:BASE    changed, unchanged, or changed,zero (reads as zeroes now).
                         BASE is the UUID of an earlier snapshot
qemu:dirty-bitmap:NAME   dirty or clean. NAME is the name of a bitmap for QEMU, and
                         BASE for xapi-nbd
any other                numbers

"info" lists the contexts of an export. "map" fails if the server does not provide the
context; the log of xapi-nbd says why.

With --json, of base:allocation: {"size": …, "extents": [{"offset": …, "length": …,
"hole": true or false, "zero": true or false}], "totals": {"data": …, "hole": …,
"zero": …, "hole_zero": …}}. Of other contexts: {"size": …, "context": …, "extents":
[{"offset": …, "length": …, "status": number, "state": text}], "totals": {state: …}}.`,
		Example: `  nbd-tool map nbd://localhost/disk
  nbd-tool map --context x-xapi:unchanged:5a9e4b21-6f7c-4f55-9a11-0c3f5e8f7d10 --uri-file uri.txt`,
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&name, "context", name, "metadata context `NAME`")
	return uriCommand(cmd, false, func(cmd *cobra.Command, t *target) error {
		conn, err := t.open(cmd.Context(), name)
		if err != nil {
			return err
		}
		defer conn.Close()
		if !hasContext(conn, name) {
			return fmt.Errorf("%s: the server does not provide the metadata context %s for this export", t.uri.Server(), name)
		}
		m := contextMap{conn, name}
		show := m.text
		if asJSON {
			show = m.json
		}
		out := bufio.NewWriter(cmd.OutOrStdout())
		if err := show(cmd.Context(), out); err != nil {
			return t.explain(err)
		}
		return out.Flush()
	})
}

func hasContext(c *client.Conn, name string) bool {
	for _, have := range c.MetaContexts() {
		if have == name {
			return true
		}
	}
	return false
}

// walk calls fn for each extent and returns the bytes in each state.
func (m contextMap) walk(ctx context.Context, fn func(extents.Extent) error) (map[uint64]int64, error) {
	totals := make(map[uint64]int64)
	ask := func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		return m.conn.BlockStatus(ctx, m.name, off, n)
	}
	return totals, extents.Walk(ctx, 0, m.conn.Size(), ask, func(e extents.Extent) error {
		totals[e.State] += e.N
		return fn(e)
	})
}

// state returns the state of an extent as text.
func (m contextMap) state(state uint64) string {
	switch {
	case m.name == wire.BaseAllocation:
		return extents.Extent{State: state}.Kind()
	case strings.HasPrefix(m.name, extents.DirtyContext) && state == extents.StateDirty:
		return "dirty"
	case strings.HasPrefix(m.name, extents.DirtyContext) && state == 0:
		return "clean"
	case strings.HasPrefix(m.name, extents.UnchangedContext) && state <= extents.StateZeroNow:
		return [...]string{0: "changed", extents.StateUnchanged: "unchanged", extents.StateZeroNow: "changed,zero"}[state]
	}
	return strconv.FormatUint(state, 10)
}

// text writes each extent at once, because there may be millions.
func (m contextMap) text(ctx context.Context, w io.Writer) error {
	totals, err := m.walk(ctx, func(e extents.Extent) error {
		_, err := fmt.Fprintf(w, "%16d %16d  %s\n", e.Off, e.N, m.state(e.State))
		return err
	})
	if err != nil {
		return err
	}
	for _, row := range m.sum(totals) {
		if _, err := fmt.Fprintf(w, "%16s %16d  %s, %.1f %%\n", "total", row.n, row.state, 100*float64(row.n)/float64(m.conn.Size())); err != nil {
			return err
		}
	}
	return nil
}

// stateTotal is the number of bytes in a state.
type stateTotal struct {
	state string
	n     int64
}

// sum adds the totals of states that have the same text.
func (m contextMap) sum(totals map[uint64]int64) []stateTotal {
	var rows []stateTotal
	for _, state := range slices.Sorted(maps.Keys(totals)) {
		text := m.state(state)
		if i := slices.IndexFunc(rows, func(r stateTotal) bool { return r.state == text }); i >= 0 {
			rows[i].n += totals[state]
		} else {
			rows = append(rows, stateTotal{text, totals[state]})
		}
	}
	return rows
}

// json writes the extents as JSON.
func (m contextMap) json(ctx context.Context, w io.Writer) error {
	about := ""
	if m.name != wire.BaseAllocation {
		quoted, err := json.Marshal(m.name)
		if err != nil {
			return err
		}
		about = fmt.Sprintf("\n  \"context\": %s,", quoted)
	}
	separator := fmt.Sprintf("{\n  \"size\": %d,%s\n  \"extents\": [", m.conn.Size(), about)
	put := func(format string, v any) error {
		text, err := json.Marshal(v)
		if err == nil {
			_, err = fmt.Fprintf(w, format, separator, text)
		}
		return err
	}
	totals, err := m.walk(ctx, func(e extents.Extent) error {
		err := put("%s\n    %s", m.element(e))
		separator = ","
		return err
	})
	if err != nil {
		return err
	}
	if separator == "," {
		separator = "\n  "
	}
	return put("%s],\n  \"totals\": %s\n}\n", m.totals(totals))
}

// element returns an element of "extents".
func (m contextMap) element(e extents.Extent) any {
	if m.name == wire.BaseAllocation {
		return mapExtent{e.Off, e.N, e.State&wire.StateHole != 0, e.IsZero()}
	}
	return contextExtent{e.Off, e.N, e.State, m.state(e.State)}
}

// totals returns the value of "totals".
func (m contextMap) totals(totals map[uint64]int64) any {
	rows := make(map[string]int64)
	for _, row := range m.sum(totals) {
		rows[row.state] = row.n
	}
	if m.name == wire.BaseAllocation {
		return mapTotals{rows["data"], rows["hole"], rows["zero"], rows["hole,zero"]}
	}
	return rows
}
