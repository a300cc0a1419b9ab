package client

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"xapi-nbd/nbd/wire"
)

// Limits of what a server may list: far above what people have, and not what
// fills a memory.
const (
	maxListed      = 10_000   // exports or contexts
	maxListedBytes = 16 << 20 // of names and texts
	maxGranted     = 1024     // contexts in force
)

// Export is one entry of a server's list. Both strings are the server's and
// untrusted; control characters in them were replaced by spaces only in the
// description, because the name must stay what the server calls it.
type Export struct{ Name, Description string }

// List asks for the server's exports, at most 10,000 of them and 16 MiB of
// names; a longer list ends the connection. Many servers refuse, with
// NBD_REP_ERR_POLICY.
func (c *Client) List(ctx context.Context) ([]Export, error) {
	var list []Export
	err := c.exchange(ctx, func() error {
		if !c.fixed {
			return errNotFixed(wire.OptList)
		}
		var total budget
		return c.ask(wire.OptList, nil, maxListed, func(typ wire.OptionReply, data []byte) error {
			if typ != wire.RepServer {
				return replyError(wire.OptList, typ, data)
			}
			r, err := wire.ParseServerReply(data)
			if err != nil {
				return fmt.Errorf("%v: %w", wire.OptList, err)
			}
			list = append(list, Export{r.Name, wire.ProtocolString(r.Details)})
			return total.add(wire.OptList, len(data))
		})
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// budget counts the bytes of a list.
type budget int

func (b *budget) add(opt wire.Option, n int) error {
	if *b += budget(n); *b > maxListedBytes {
		return fmt.Errorf("%v: list of more than %d bytes", opt, maxListedBytes)
	}
	return nil
}

// ListMetaContexts asks which metadata contexts an export has: those that match
// one of the queries, or all if there are none. It selects nothing. Without
// structured replies it fails with [ErrUnsupported].
func (c *Client) ListMetaContexts(ctx context.Context, export string, queries ...string) ([]string, error) {
	var names []string
	err := c.exchange(ctx, func() error {
		if !c.Structured() {
			return fmt.Errorf("%v without structured replies: %w", wire.OptListMetaContext, ErrUnsupported)
		}
		var total budget
		return c.askMetaContexts(wire.OptListMetaContext, export, queries, maxListed, func(m wire.MetaContext) error {
			names = append(names, m.Name)
			return total.add(wire.OptListMetaContext, len(m.Name))
		})
	})
	if err != nil {
		return nil, err
	}
	return names, nil
}

func (c *Client) askMetaContexts(opt wire.Option, export string, queries []string, limit int, take func(wire.MetaContext) error) error {
	if err := checkString("export name", export); err != nil {
		return err
	}
	for _, q := range queries {
		if err := checkString("query", q); err != nil {
			return err
		}
	}
	req := wire.MetaContextRequest{Export: export, Queries: queries}
	return c.ask(opt, req.Append(nil), limit, func(typ wire.OptionReply, data []byte) error {
		if typ != wire.RepMetaContext {
			return replyError(opt, typ, data)
		}
		m, err := wire.ParseMetaContext(data)
		if err != nil {
			return fmt.Errorf("%v: %w", opt, err)
		}
		return take(m)
	})
}

// metaContexts are the contexts in force by their ids. A server that grants one
// that was not asked for will report it, so its id is known, but not its name.
type metaContexts map[uint32]string

// setMetaContexts selects the configured contexts for an export. They are
// optional: if the server refuses, GO will tell whether the export is at fault.
func (c *Client) setMetaContexts(export string) (metaContexts, error) {
	queries := c.cfg.MetaContexts
	if !c.Structured() || len(queries) == 0 {
		return nil, nil
	}
	granted := make(metaContexts)
	err := c.askMetaContexts(wire.OptSetMetaContext, export, queries, maxGranted, func(m wire.MetaContext) error {
		if _, twice := granted[m.ID]; twice {
			return fmt.Errorf("%v: server gave the id %d twice", wire.OptSetMetaContext, m.ID)
		}
		if _, twice := granted.id(m.Name); twice || !wasAskedFor(queries, m.Name) {
			m.Name = ""
		}
		granted[m.ID] = m.Name
		return nil
	})
	switch {
	case err == nil:
		return granted, nil
	case isRefused(err) && !isReply(err, wire.RepErrShutdown):
		return nil, nil
	}
	return nil, err
}

// wasAskedFor reports whether a query names the context, or its namespace if it
// is one that has wildcards.
func wasAskedFor(queries []string, name string) bool {
	return slices.ContainsFunc(queries, func(q string) bool {
		return q == name || strings.HasSuffix(q, ":") && strings.HasPrefix(name, q)
	})
}

// names are the contexts that can be used, in order.
func (m metaContexts) names() []string {
	var names []string
	for _, name := range m {
		if name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// id is the id of a usable context.
func (m metaContexts) id(name string) (uint32, bool) {
	for id, n := range m {
		if n == name && name != "" {
			return id, true
		}
	}
	return 0, false
}
