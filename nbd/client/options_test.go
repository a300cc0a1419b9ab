package client

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

func clientOf(t *testing.T, cfg *Config, run func(s *script)) *Client {
	t.Helper()
	c, err := New(t.Context(), against(t, run), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Abort() })
	return c
}

// TestClientChoosesReplies: the client asks for extended headers first, then for structured
// replies, and works with neither.
func TestClientChoosesReplies(t *testing.T) {
	ext, str := wire.OptExtendedHeaders, wire.OptStructuredReply
	tests := []struct {
		name    string
		cfg     Config
		answers map[wire.Option]wire.OptionReply
		asked   []wire.Option
		mode    replyMode
	}{
		{"all", Config{}, map[wire.Option]wire.OptionReply{ext: wire.RepAck}, []wire.Option{ext}, extendedHeaders},
		{"no extended", Config{}, map[wire.Option]wire.OptionReply{ext: wire.RepErrUnsup, str: wire.RepAck}, []wire.Option{ext, str}, structuredReplies},
		{"nothing", Config{}, map[wire.Option]wire.OptionReply{ext: wire.RepErrUnsup, str: wire.RepErrUnsup}, []wire.Option{ext, str}, simpleReplies},
		{"refused otherwise", Config{}, map[wire.Option]wire.OptionReply{ext: wire.RepErrTLSReqd, str: 1<<31 | 4711}, []wire.Option{ext, str}, simpleReplies},
		{"not to be extended", Config{NoExtended: true}, map[wire.Option]wire.OptionReply{str: wire.RepAck}, []wire.Option{str}, structuredReplies},
		{"not to be structured", Config{NoStructured: true}, nil, nil, simpleReplies},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked []wire.Option
				c := clientOf(t, &tt.cfg, func(s *script) {
					s.greet()
					for {
						opt := s.option()
						if opt == wire.OptAbort {
							return
						}
						asked = append(asked, opt)
						s.refuse(opt, tt.answers[opt])
					}
				})
				if c.Structured() != (tt.mode >= structuredReplies) || c.Extended() != (tt.mode == extendedHeaders) {
					t.Errorf("structured %v, extended %v, want mode %d", c.Structured(), c.Extended(), tt.mode)
				}
				if err := c.Abort(); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				if diff := cmp.Diff(tt.asked, asked); diff != "" {
					t.Errorf("options (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func serverReply(name, details string) []byte {
	r := wire.ServerReply{Name: name, Details: details}
	return wire.AppendOptionReply(nil, wire.OptList, wire.RepServer, r.Append(nil))
}

func TestClientList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clientOf(t, nil, func(s *script) {
			s.replies(t, structuredReplies)
			s.want(t, wire.OptList)
			s.send(serverReply("", "the default"), serverReply("disk", ""), serverReply("\x1b[2J", "\x1b[2J"))
			s.ack(wire.OptList)
			s.want(t, wire.OptList)
			s.refuse(wire.OptList, wire.RepErrPolicy)
			s.want(t, wire.OptList)
			for i := range maxListed {
				s.send(serverReply(fmt.Sprint(i), ""))
			}
			s.ack(wire.OptList)
			s.want(t, wire.OptAbort)
		})
		list, err := c.List(t.Context())
		want := []Export{{"", "the default"}, {"disk", ""}, {"\x1b[2J", " [2J"}}
		if diff := cmp.Diff(want, list); diff != "" || err != nil {
			t.Errorf("error %v, list (-want +got):\n%s", err, diff)
		}
		if _, err := c.List(t.Context()); !isReply(err, wire.RepErrPolicy) {
			t.Errorf("got error %v, want the refusal", err)
		}
		if list, err := c.List(t.Context()); len(list) != maxListed || err != nil {
			t.Errorf("long list: %d exports, error %v", len(list), err)
		}
	})
}

func TestClientListMetaContexts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clientOf(t, nil, func(s *script) {
			s.replies(t, structuredReplies)
			r, err := wire.ParseMetaContextRequest(s.want(t, wire.OptListMetaContext))
			if diff := cmp.Diff(wire.MetaContextRequest{Export: "disk", Queries: []string{"base:", "x:y"}}, r); diff != "" || err != nil {
				t.Errorf("error %v, request (-want +got):\n%s", err, diff)
			}
			for _, name := range []string{"base:allocation", "x:y"} {
				s.send(wire.AppendOptionReply(nil, wire.OptListMetaContext, wire.RepMetaContext, wire.MetaContext{Name: name}.Append(nil)))
			}
			s.ack(wire.OptListMetaContext)
			s.discard()
		})
		got, err := c.ListMetaContexts(t.Context(), "disk", "base:", "x:y")
		if diff := cmp.Diff([]string{"base:allocation", "x:y"}, got); diff != "" || err != nil {
			t.Errorf("error %v, contexts (-want +got):\n%s", err, diff)
		}
		plain := clientOf(t, &Config{NoStructured: true}, func(s *script) { s.greet(); s.discard() })
		if _, err := plain.ListMetaContexts(t.Context(), "disk"); !errors.Is(err, ErrUnsupported) {
			t.Errorf("without structured replies: got error %v, want ErrUnsupported", err)
		}
	})
}

func TestClientInfo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		want := wire.ExportInfo{Size: 5, Flags: allFlags, Name: "n", Description: "d", BlockSizes: wire.BlockSizes{Min: 1, Preferred: 512, MaxPayload: 1024}}
		c := clientOf(t, nil, func(s *script) {
			s.replies(t, simpleReplies)
			r, err := wire.ParseInfoRequest(s.want(t, wire.OptInfo))
			if err != nil || r.Name != "disk" {
				t.Errorf("request %+v, error %v", r, err)
			}
			for _, i := range append(r.Infos, wire.InfoExport) {
				s.send(wire.AppendOptionReply(nil, wire.OptInfo, wire.RepInfo, want.AppendInfo(nil, i)))
			}
			s.ack(wire.OptInfo)
			s.want(t, wire.OptInfo)
			s.refuse(wire.OptInfo, wire.RepErrUnknown)
			s.discard()
		})
		got, err := c.Info(t.Context(), "disk")
		if err != nil || *got != want {
			t.Errorf("got %+v and error %v, want %+v", got, err, want)
		}
		if _, err := c.Info(t.Context(), "other"); !isReply(err, wire.RepErrUnknown) {
			t.Errorf("got error %v, want the refusal", err)
		}
		if _, err := c.Info(t.Context(), strings.Repeat("x", 4097)); err == nil || c.ended != nil {
			t.Errorf("long name: error %v, client ended with %v", err, c.ended)
		}
	})
}

// A list that is too long or malformed ends the connection.
func TestClientEndsBrokenLists(t *testing.T) {
	tests := []struct {
		name string
		send func(s *script)
		want string
	}{
		{"endless", func(s *script) {
			for {
				s.send(serverReply("x", ""))
			}
		}, "endless"},
		{"endless bytes", func(s *script) {
			for {
				s.send(serverReply(strings.Repeat("x", 4096), strings.Repeat("y", 4096)))
			}
		}, "list of more than"},
		{"name longer than its reply", func(s *script) {
			s.send(wire.AppendOptionReply(nil, wire.OptList, wire.RepServer, []byte{0, 0, 0, 9, 'x'}))
		}, "malformed"},
		{"no name", func(s *script) { s.send(wire.AppendOptionReply(nil, wire.OptList, wire.RepServer, nil)) }, "malformed"},
		{"information", func(s *script) { s.send(wire.AppendOptionReply(nil, wire.OptList, wire.RepInfo, make([]byte, 12))) }, "unexpected reply"},
		{"end", func(s *script) { s.send(serverReply("x", "")) }, "no answer"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := clientOf(t, nil, func(s *script) {
					s.replies(t, structuredReplies)
					s.want(t, wire.OptList)
					tt.send(s)
				})
				_, err := c.List(t.Context())
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got error %v, want one that says %q", err, tt.want)
				}
				if _, err := c.Go(t.Context(), "a"); err == nil {
					t.Error("the client can still be used")
				}
				if err := c.Abort(); err != nil {
					t.Errorf("Abort after the end: %v", err)
				}
			})
		})
	}
}

// After NBD_REP_ERR_SHUTDOWN to any option the client sends NBD_OPT_ABORT and closes.
func TestClientLeavesAServerThatShutsDown(t *testing.T) {
	calls := map[wire.Option]func(context.Context, *Client) error{
		wire.OptList:            func(ctx context.Context, c *Client) error { _, err := c.List(ctx); return err },
		wire.OptInfo:            func(ctx context.Context, c *Client) error { _, err := c.Info(ctx, "a"); return err },
		wire.OptSetMetaContext:  func(ctx context.Context, c *Client) error { _, err := c.Go(ctx, "a"); return err },
		wire.OptListMetaContext: func(ctx context.Context, c *Client) error { _, err := c.ListMetaContexts(ctx, "a"); return err },
	}
	for opt, call := range calls {
		t.Run(opt.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := clientOf(t, &Config{MetaContexts: []string{wire.BaseAllocation}}, func(s *script) {
					s.replies(t, structuredReplies)
					s.want(t, opt)
					s.refuse(opt, wire.RepErrShutdown)
					s.want(t, wire.OptAbort)
				})
				if err := call(t.Context(), c); !isReply(err, wire.RepErrShutdown) {
					t.Errorf("got error %v, want the refusal", err)
				}
				if _, err := c.Go(t.Context(), "a"); !isReply(err, wire.RepErrShutdown) {
					t.Errorf("afterwards: got error %v", err)
				}
			})
		})
	}
	t.Run("at once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			nc := against(t, func(s *script) {
				s.greet()
				s.want(t, wire.OptExtendedHeaders)
				s.refuse(wire.OptExtendedHeaders, wire.RepErrShutdown)
				s.want(t, wire.OptAbort)
			})
			if _, err := New(t.Context(), nc, nil); !isReply(err, wire.RepErrShutdown) {
				t.Errorf("got error %v, want the refusal", err)
			}
		})
	})
}

// Servers without NBD_OPT_GO, and servers without fixed newstyle.
func TestClientFallsBackToExportName(t *testing.T) {
	for _, offered := range []wire.HandshakeFlags{0, wire.FlagNoZeroes, wire.FlagFixedNewstyle, wire.FlagFixedNewstyle | wire.FlagNoZeroes} {
		t.Run(offered.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := clientOf(t, nil, func(s *script) {
					s.send(wire.AppendGreeting(nil, offered))
					if got := wire.ParseClientFlags((*[4]byte)(s.receive(4))); uint32(got) != uint32(offered) {
						t.Errorf("client flags %v, offered were %v", got, offered)
					}
					if offered&wire.FlagFixedNewstyle != 0 {
						for _, opt := range []wire.Option{wire.OptExtendedHeaders, wire.OptStructuredReply, wire.OptInfo, wire.OptGo} {
							s.want(t, opt)
							s.refuse(opt, wire.RepErrUnsup)
						}
					}
					if got := string(s.want(t, wire.OptExportName)); got != "disk" {
						t.Errorf("export name %q", got)
					}
					s.send(wire.AppendExportNameReply(nil, 1<<20, wire.FlagHasFlags, offered&wire.FlagNoZeroes == 0))
					r := s.request()
					s.send(simpleReply(0, r.Cookie, patternOf(int64(r.Offset), int(r.Length))...))
					if r := s.request(); r.Command != wire.CmdDisc {
						t.Errorf("the client left with %v", r.Command)
					}
				})
				if _, err := c.Info(t.Context(), "disk"); err == nil {
					t.Error("Info succeeded")
				}
				conn, err := c.Go(t.Context(), "disk")
				if err != nil {
					t.Fatal(err)
				}
				p := make([]byte, 1000)
				if _, err := conn.ReadAt(p, 3); err != nil || string(p) != string(patternOf(3, 1000)) || conn.Size() != 1<<20 {
					t.Errorf("error %v or wrong data", err)
				}
				conn.Close()
			})
		})
	}
}

// Without fixed newstyle the client may send no option but NBD_OPT_EXPORT_NAME.
func TestClientOfAnOldServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := func(s *script) {
			s.send(wire.AppendGreeting(nil, wire.FlagNoZeroes))
			s.receive(4)
			var b [1]byte
			if n, _ := s.nc.Read(b[:]); n != 0 {
				t.Error("the client sent something")
			}
		}
		nc := against(t, old)
		if _, err := New(t.Context(), nc, &Config{TLSConfig: clientTLS(t)}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("TLS: got error %v, want ErrUnsupported", err)
		}
		nc.Close()
		c := clientOf(t, nil, old)
		_, lerr := c.List(t.Context())
		_, ierr := c.Info(t.Context(), "a")
		_, merr := c.ListMetaContexts(t.Context(), "a")
		for _, err := range []error{lerr, ierr, merr} {
			if !errors.Is(err, ErrUnsupported) {
				t.Errorf("got error %v, want ErrUnsupported", err)
			}
		}
		if err := c.Abort(); err != nil {
			t.Error(err)
		}
	})
}

// Client.TLS returns the state of TLS, or nil without TLS.
func TestClientTLSState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &nbd.Server{TLSConfig: serverTLS(t)}
		s.TLSPolicy = func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return nbd.SelectiveTLS, nil }
		encrypted, _ := nbdtest.Pipe(t, s)
		c, err := New(t.Context(), encrypted, &Config{TLSConfig: clientTLS(t)})
		if err != nil {
			t.Fatal(err)
		}
		if state := c.TLS(); state == nil || !state.HandshakeComplete {
			t.Errorf("TLS state %+v", state)
		}
		c.Abort()
		clear, _ := nbdtest.Pipe(t, s)
		if c, err = New(t.Context(), clear, nil); err != nil || c.TLS() != nil {
			t.Errorf("in the clear: error %v", err)
		}
		c.Abort()
	})
}
