package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// mapExtent is one element of what map --json prints; its keys do not change.
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

func (t *mapTotals) add(e extent) {
	switch e.kind() {
	case "data":
		t.Data += e.n
	case "hole":
		t.Hole += e.n
	case "zero":
		t.Zero += e.n
	default:
		t.HoleZero += e.n
	}
}

func newMapCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "map",
		Short: "Show which parts of an export are data, holes and zeroes",
		Long: `Show the extents of an export in the metadata context base:allocation: offset,
length and state, then the totals, in bytes. A hole has no storage behind it;
only a state with zero in it reads as zeroes for certain.

With --json: {"size": …, "extents": [{"offset": …, "length": …, "hole": true or
false, "zero": true or false}], "totals": {"data": …, "hole": …, "zero": …,
"hole_zero": …}}.`,
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return uriCommand(cmd, false, func(cmd *cobra.Command, t *target) error {
		conn, err := t.open(cmd.Context(), wire.BaseAllocation)
		if err != nil {
			return err
		}
		defer conn.Close()
		if !hasContext(conn, wire.BaseAllocation) {
			return fmt.Errorf("%s: the server does not tell %s of this export", t.uri.Server(), wire.BaseAllocation)
		}
		show := mapText
		if asJSON {
			show = mapJSON
		}
		out := bufio.NewWriter(cmd.OutOrStdout())
		if err := show(cmd.Context(), out, conn); err != nil {
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

// allocation asks a connection for base:allocation.
func allocation(c *client.Conn) asker {
	return func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		return c.BlockStatus(ctx, wire.BaseAllocation, off, n)
	}
}

// mapText writes the extents as they come: there may be millions.
func mapText(ctx context.Context, w io.Writer, c *client.Conn) error {
	var totals mapTotals
	err := walkExtents(ctx, c.Size(), allocation(c), func(e extent) error {
		totals.add(e)
		_, err := fmt.Fprintf(w, "%16d %16d  %s\n", e.off, e.n, e.kind())
		return err
	})
	if err != nil {
		return err
	}
	for _, row := range []struct {
		n    int64
		kind string
	}{{totals.Data, "data"}, {totals.Hole, "hole"}, {totals.Zero, "zero"}, {totals.HoleZero, "hole,zero"}} {
		if row.n == 0 {
			continue
		}
		if _, err := fmt.Fprintf(w, "%16s %16d  %s, %.1f %%\n", "total", row.n, row.kind, 100*float64(row.n)/float64(c.Size())); err != nil {
			return err
		}
	}
	return nil
}

// mapJSON is mapText for scripts.
func mapJSON(ctx context.Context, w io.Writer, c *client.Conn) error {
	var totals mapTotals
	separator := fmt.Sprintf("{\n  \"size\": %d,\n  \"extents\": [", c.Size())
	put := func(format string, v any) error {
		text, err := json.Marshal(v)
		if err == nil {
			_, err = fmt.Fprintf(w, format, separator, text)
		}
		return err
	}
	err := walkExtents(ctx, c.Size(), allocation(c), func(e extent) error {
		totals.add(e)
		err := put("%s\n    %s", mapExtent{e.off, e.n, e.state&wire.StateHole != 0, e.isZero()})
		separator = ","
		return err
	})
	if err != nil {
		return err
	}
	if separator == "," {
		separator = "\n  "
	}
	return put("%s],\n  \"totals\": %s\n}\n", totals)
}
