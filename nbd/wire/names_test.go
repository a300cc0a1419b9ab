package wire_test

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
)

// protocolNames are numbers and names of the protocol text, by Go type.
var protocolNames = map[string]map[uint64]string{
	"Option": {1: "NBD_OPT_EXPORT_NAME", 2: "NBD_OPT_ABORT", 3: "NBD_OPT_LIST", 4: "NBD_OPT_PEEK_EXPORT",
		5: "NBD_OPT_STARTTLS", 6: "NBD_OPT_INFO", 7: "NBD_OPT_GO", 8: "NBD_OPT_STRUCTURED_REPLY",
		9: "NBD_OPT_LIST_META_CONTEXT", 10: "NBD_OPT_SET_META_CONTEXT", 11: "NBD_OPT_EXTENDED_HEADERS"},
	"OptionReply": {1: "NBD_REP_ACK", 2: "NBD_REP_SERVER", 3: "NBD_REP_INFO", 4: "NBD_REP_META_CONTEXT",
		1<<31 + 1: "NBD_REP_ERR_UNSUP", 1<<31 + 2: "NBD_REP_ERR_POLICY", 1<<31 + 3: "NBD_REP_ERR_INVALID",
		1<<31 + 4: "NBD_REP_ERR_PLATFORM", 1<<31 + 5: "NBD_REP_ERR_TLS_REQD", 1<<31 + 6: "NBD_REP_ERR_UNKNOWN",
		1<<31 + 7: "NBD_REP_ERR_SHUTDOWN", 1<<31 + 8: "NBD_REP_ERR_BLOCK_SIZE_REQD",
		1<<31 + 9: "NBD_REP_ERR_TOO_BIG", 1<<31 + 10: "NBD_REP_ERR_EXT_HEADER_REQD"},
	"Info": {0: "NBD_INFO_EXPORT", 1: "NBD_INFO_NAME", 2: "NBD_INFO_DESCRIPTION", 3: "NBD_INFO_BLOCK_SIZE"},
	"Command": {0: "NBD_CMD_READ", 1: "NBD_CMD_WRITE", 2: "NBD_CMD_DISC", 3: "NBD_CMD_FLUSH", 4: "NBD_CMD_TRIM",
		5: "NBD_CMD_CACHE", 6: "NBD_CMD_WRITE_ZEROES", 7: "NBD_CMD_BLOCK_STATUS", 8: "NBD_CMD_RESIZE"},
	"Errno": {0: "success", 1: "NBD_EPERM", 5: "NBD_EIO", 12: "NBD_ENOMEM", 22: "NBD_EINVAL", 28: "NBD_ENOSPC",
		75: "NBD_EOVERFLOW", 95: "NBD_ENOTSUP", 108: "NBD_ESHUTDOWN"},
	"ChunkType": {0: "NBD_REPLY_TYPE_NONE", 1: "NBD_REPLY_TYPE_OFFSET_DATA", 2: "NBD_REPLY_TYPE_OFFSET_HOLE",
		5: "NBD_REPLY_TYPE_BLOCK_STATUS", 6: "NBD_REPLY_TYPE_BLOCK_STATUS_EXT",
		1<<15 + 1: "NBD_REPLY_TYPE_ERROR", 1<<15 + 2: "NBD_REPLY_TYPE_ERROR_OFFSET"},
	"ChunkFlags":     {1: "DONE"},
	"HandshakeFlags": {1: "FIXED_NEWSTYLE", 2: "NO_ZEROES"},
	"ClientFlags":    {1: "C_FIXED_NEWSTYLE", 2: "C_NO_ZEROES"},
	"TransmissionFlags": {1: "HAS_FLAGS", 1 << 1: "READ_ONLY", 1 << 2: "SEND_FLUSH", 1 << 3: "SEND_FUA",
		1 << 4: "ROTATIONAL", 1 << 5: "SEND_TRIM", 1 << 6: "SEND_WRITE_ZEROES", 1 << 7: "SEND_DF",
		1 << 8: "CAN_MULTI_CONN", 1 << 9: "SEND_RESIZE", 1 << 10: "SEND_CACHE", 1 << 11: "SEND_FAST_ZERO",
		1 << 12: "BLOCK_STATUS_PAYLOAD"},
	"CommandFlags": {1: "FUA", 1 << 1: "NO_HOLE", 1 << 2: "DF", 1 << 3: "REQ_ONE", 1 << 4: "FAST_ZERO", 1 << 5: "PAYLOAD_LEN"},
}

// stringers give a number its Go type.
var stringers = map[string]func(uint64) fmt.Stringer{
	"Option":            func(v uint64) fmt.Stringer { return wire.Option(v) },
	"OptionReply":       func(v uint64) fmt.Stringer { return wire.OptionReply(v) },
	"Info":              func(v uint64) fmt.Stringer { return wire.Info(v) },
	"Command":           func(v uint64) fmt.Stringer { return wire.Command(v) },
	"Errno":             func(v uint64) fmt.Stringer { return wire.Errno(v) },
	"ChunkType":         func(v uint64) fmt.Stringer { return wire.ChunkType(v) },
	"ChunkFlags":        func(v uint64) fmt.Stringer { return wire.ChunkFlags(v) },
	"HandshakeFlags":    func(v uint64) fmt.Stringer { return wire.HandshakeFlags(v) },
	"ClientFlags":       func(v uint64) fmt.Stringer { return wire.ClientFlags(v) },
	"TransmissionFlags": func(v uint64) fmt.Stringer { return wire.TransmissionFlags(v) },
	"CommandFlags":      func(v uint64) fmt.Stringer { return wire.CommandFlags(v) },
}

func TestNames(t *testing.T) {
	for typ, names := range protocolNames {
		for v, want := range names {
			if got := stringers[typ](v).String(); got != want {
				t.Errorf("%s(%#x): got %q, want %q", typ, v, got, want)
			}
		}
	}
}

func TestUnknownNames(t *testing.T) {
	tests := []struct {
		v    fmt.Stringer
		want string
	}{
		{wire.Option(0), "NBD_OPT(0)"},
		{wire.Option(12), "NBD_OPT(12)"},
		{wire.Option(1<<32 - 1), "NBD_OPT(4294967295)"},
		{wire.OptionReply(0), "NBD_REP(0)"},
		{wire.OptionReply(1<<31 + 11), "NBD_REP(2147483659)"},
		{wire.Info(4), "NBD_INFO(4)"},
		{wire.Command(9), "NBD_CMD(9)"},
		{wire.Errno(2), "NBD_E(2)"},
		{wire.ChunkType(3), "NBD_REPLY_TYPE(3)"},
		{wire.ChunkType(1<<15 + 3), "NBD_REPLY_TYPE(32771)"},
		{wire.ChunkFlags(0), "0"},
		{wire.ChunkFlags(0x8001), "DONE|0x8000"},
		{wire.HandshakeFlags(0), "0"},
		{wire.HandshakeFlags(3), "FIXED_NEWSTYLE|NO_ZEROES"},
		{wire.HandshakeFlags(0x8001), "FIXED_NEWSTYLE|0x8000"},
		{wire.ClientFlags(0), "0"},
		{wire.ClientFlags(0xfffffffc), "0xfffffffc"},
		{wire.ClientFlags(7), "C_FIXED_NEWSTYLE|C_NO_ZEROES|0x4"},
		{wire.TransmissionFlags(0x103), "HAS_FLAGS|READ_ONLY|CAN_MULTI_CONN"},
		{wire.TransmissionFlags(0xe000), "0xe000"},
		{wire.CommandFlags(0x15), "FUA|DF|FAST_ZERO"},
		{wire.CommandFlags(0xffc2), "NO_HOLE|0xffc0"},
	}
	for _, tt := range tests {
		if got := tt.v.String(); got != tt.want {
			t.Errorf("%T: got %q, want %q", tt.v, got, tt.want)
		}
	}
	if got, want := wire.EIO.Error(), "NBD_EIO"; got != want {
		t.Errorf("EIO as an error: got %q, want %q", got, want)
	}
}

// TestEveryConstantIsNamed reads this package's source: a constant that is new
// to it needs a row in protocolNames, and so a name. Values are the protocol's
// and therefore different from each other.
func TestEveryConstantIsNamed(t *testing.T) {
	seen := make(map[string]int)
	for _, c := range constantsOf(t) {
		named, ok := types.Unalias(c.Type()).(*types.Named)
		if !ok || !c.Exported() {
			continue
		}
		typ := named.Obj().Name()
		names, ok := protocolNames[typ]
		if !ok {
			t.Errorf("type %s of %s is not checked here", typ, c.Name())
			continue
		}
		v, exact := constant.Uint64Val(c.Val())
		if _, ok := names[v]; !ok || !exact {
			t.Errorf("%s = %v has no name that is checked here", c.Name(), c.Val())
		}
		seen[typ]++
	}
	for typ, names := range protocolNames {
		if seen[typ] != len(names) {
			t.Errorf("%s: got %d constants, want %d", typ, seen[typ], len(names))
		}
	}
}

// constantsOf returns the package's constants.
func constantsOf(t *testing.T) []*types.Const {
	t.Helper()
	entries, err := fs.Glob(os.DirFS("."), "*.go")
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range entries {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	// Imports stay unresolved, which the constants do not mind: errors about
	// them are ignored.
	conf := types.Config{Error: func(error) {}}
	pkg, _ := conf.Check("wire", fset, files, nil)
	var consts []*types.Const
	for _, name := range pkg.Scope().Names() {
		if c, ok := pkg.Scope().Lookup(name).(*types.Const); ok {
			consts = append(consts, c)
		}
	}
	if len(consts) == 0 {
		t.Fatal("no constants found")
	}
	return consts
}
