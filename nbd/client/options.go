package client

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"xapi-nbd/nbd/wire"
)

// Limits of the lists that a server may send. Longer lists would be an attempt to fill the
// client's memory.
const (
	maxListed      = 10_000   // exports, or metadata contexts of one export
	maxListedBytes = 16 << 20 // bytes of all names and descriptions in one list
	maxGranted     = 1024     // metadata contexts of one connection
)

// Export is one entry of a server's list. Both strings come from the server and are not
// trusted. Control characters in the description were replaced by spaces; the name is
// unchanged, because [Client.Go] needs it as it is.
type Export struct{ Name, Description string }

// List returns the server's exports, section "NBD_OPT_LIST". Servers may refuse: the error
// then matches [io/fs.ErrPermission] or [errors.ErrUnsupported]. A list of more than 10,000
// exports or 16 MiB ends the connection with an error.
func (c *Client) List(ctx context.Context) ([]Export, error) {
	var list []Export
	err := c.exchange(ctx, func() error {
		if !c.fixed {
			return errNotFixed(wire.OptList)
		}
		var total listSize
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

// listSize is the number of bytes of a list.
type listSize int

// add adds n bytes and fails if the list is too long.
func (s *listSize) add(opt wire.Option, n int) error {
	if *s += listSize(n); *s > maxListedBytes {
		return fmt.Errorf("%v: list of more than %d bytes", opt, maxListedBytes)
	}
	return nil
}

// ListMetaContexts returns the names of the metadata contexts that an export has and that
// match one of the queries, or of all if there are no queries, section
// "NBD_OPT_LIST_META_CONTEXT". It does not select them: [Config] says which contexts
// [Client.Go] asks for. Without structured replies the error matches [ErrUnsupported].
func (c *Client) ListMetaContexts(ctx context.Context, export string, queries ...string) ([]string, error) {
	var names []string
	err := c.exchange(ctx, func() error {
		if !c.Structured() {
			return fmt.Errorf("%v without structured replies: %w", wire.OptListMetaContext, ErrUnsupported)
		}
		var total listSize
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

// askMetaContexts sends one of the two options about metadata contexts, and calls take for
// each context in the replies.
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

// metaContexts maps the ids of the granted metadata contexts to their names. A context
// that the client did not ask for has the name "": the server will send its status, but
// the caller cannot use it.
type metaContexts map[uint32]string

// setMetaContexts selects the configured metadata contexts for an export. A refusal is no
// error, because contexts are optional; if the export is the reason, the server refuses GO
// too.
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
		if _, twice := granted.id(m.Name); twice || !matchesQuery(queries, m.Name) {
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

// matchesQuery reports whether one of the queries is the name of the context, or its
// namespace with the colon, which asks for all contexts in it.
func matchesQuery(queries []string, name string) bool {
	return slices.ContainsFunc(queries, func(q string) bool {
		return q == name || strings.HasSuffix(q, ":") && strings.HasPrefix(name, q)
	})
}

// names returns the names of the contexts that the caller can use, sorted.
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

// id returns the id of a context that the caller can use.
func (m metaContexts) id(name string) (uint32, bool) {
	for id, n := range m {
		if n == name && name != "" {
			return id, true
		}
	}
	return 0, false
}
