package xapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// listChanged asks a responder with that answer for the blocks of a disk.
func listChanged(t *testing.T, size int64, answer string) (*ChangedBlocks, error) {
	t.Helper()
	r := respond(t, always(answer))
	return testClient(t, Config{Socket: r.Socket}).Bind(secret).ListChangedBlocks(t.Context(), "OpaqueRef:base", "OpaqueRef:this", size)
}

// The bits are those that real tools gave for writes at 0, 128 KiB and 576 KiB to
// 704 KiB.
func TestListChangedBlocks(t *testing.T) {
	r := respond(t, always(ok(successXML("oEA="))))
	changed, err := testClient(t, Config{Socket: r.Socket}).Bind(secret).ListChangedBlocks(t.Context(), "OpaqueRef:base", "OpaqueRef:this", 16*ChangedBlockSize)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := changedList(changed), "0 2 9"; got != want {
		t.Errorf("got blocks %s, want %s", got, want)
	}
	if got, want := changed.Bytes(), int64(3*ChangedBlockSize); got != want {
		t.Errorf("got %d bytes, want %d", got, want)
	}
	want := "<methodName>VDI.list_changed_blocks</methodName><params><param><value><string>" + secret +
		"</string></value></param><param><value><string>OpaqueRef:base</string></value></param><param><value><string>OpaqueRef:this</string></value></param></params>"
	if got := r.seen()[0].body; !strings.Contains(got, want) {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

// changedList returns the numbers of the changed blocks.
func changedList(c *ChangedBlocks) string {
	var blocks []string
	for off := int64(0); off < c.Size(); off += ChangedBlockSize {
		if changed, _ := c.Run(off, 1); changed {
			blocks = append(blocks, fmt.Sprint(off/ChangedBlockSize))
		}
	}
	return strings.Join(blocks, " ")
}

// The bitmap of a disk with 8 complete blocks and a part of a ninth may have one byte
// or two; the ninth block has changed if it is not covered.
func TestChangedBlocksLength(t *testing.T) {
	const size = 8*ChangedBlockSize + 512
	tests := []struct {
		bitmap []byte
		want   string // the changed blocks, or the error
	}{
		{nil, errShortBitmap.Error()},
		{[]byte{0x01}, "7 8"},
		{[]byte{0x01, 0x00}, "7"},
		{[]byte{0x01, 0xff}, "7 8"},
		{[]byte{0x01, 0x00, 0x00}, errLongBitmap.Error()},
		{make([]byte, 1<<20), errLongBitmap.Error()},
	}
	for _, tt := range tests {
		changed, err := listChanged(t, size, ok(successXML(base64.StdEncoding.EncodeToString(tt.bitmap))))
		if err != nil {
			if !errors.Is(err, ErrAnswer) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%d bytes: got %v, want %s", len(tt.bitmap), err, tt.want)
			}
			continue
		}
		if got := changedList(changed); got != tt.want {
			t.Errorf("%x: got blocks %s, want %s", tt.bitmap, got, tt.want)
		}
	}
}

func TestListChangedBlocksMalformed(t *testing.T) {
	const size = 64 << 30 // 128 KiB of bitmap
	whole := base64.StdEncoding.EncodeToString(make([]byte, 128<<10))
	tests := []struct{ name, answer string }{
		{"nothing", ok("")},
		{"void", ok(successXML(""))},
		{"no padding", ok(successXML(strings.TrimRight(whole, "=")))},
		{"a character too few", ok(successXML(whole[1:]))},
		{"padding inside", ok(successXML("AA==" + whole[4:]))},
		{"padding where a chunk ends", ok(successXML(base64.StdEncoding.EncodeToString(make([]byte, 49150)) + base64.StdEncoding.EncodeToString(make([]byte, 128<<10-49150))))},
		{"a line break", ok(successXML(whole[:4] + "\n" + whole[4:]))},
		{"a line break at the end", ok(successXML(whole + "\n"))},
		{"a blank", ok(successXML(whole[:400] + " " + whole[400:]))},
		{"not base64", ok(successXML("AA.A" + whole[4:]))},
		{"URL alphabet", ok(successXML("AA-_" + whole[4:]))},
		{"an entity", ok(successXML("AA&amp;" + whole[4:]))},
		{"stray bits", ok(successXML(whole[:len(whole)-2] + "B="))},
		{"the session", ok(successXML(secret))},
		{"an array", ok(successXML("<array><data><value>" + whole + "</value></data></array>"))},
		{"ends in the bitmap", "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + envelope + member("Status", "Success") + "<member><name>Value</name><value>" + whole},
		{"HTTP error", "HTTP/1.1 500 Internal Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"},
		{"a long failure", ok(failureXML("SR_BACKEND_FAILURE_460", strings.Repeat("x", maxLongReply)))},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			changed, err := listChanged(t, size, tt.answer)
			if _, isTransport := errors.AsType[*TransportError](err); !isTransport || !errors.Is(err, ErrAnswer) || changed != nil {
				t.Errorf("got %v, %v, want an unusable answer", changed, err)
			} else if strings.Contains(err.Error(), secret) {
				t.Errorf("the error shows the session: %v", err)
			}
		})
	}
	// The connection ends before the announced length.
	answer := ok(successXML(whole))
	for _, n := range []int{len(answer) - len(whole) - 200, len(answer) - 1000, len(answer) - 1} {
		_, err := listChanged(t, size, answer[:n])
		if !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, ErrAnswer) {
			t.Errorf("cut to %d of %d bytes: got %v, want io.ErrUnexpectedEOF", n, len(answer), err)
		}
	}
}

func TestListChangedBlocksErrors(t *testing.T) {
	unrelated := []string{"SR_BACKEND_FAILURE_460", "", "Failed to calculate changed blocks for given VDIs. [opterr=Source and target VDI are unrelated]", ""}
	tests := []struct {
		answer []string
		want   ErrorCode
	}{
		{[]string{"VDI_IN_USE", "OpaqueRef:this", "list_changed_blocks"}, VDIInUse},
		{[]string{"SR_OPERATION_NOT_SUPPORTED", "OpaqueRef:sr"}, SROperationNotSupported},
		{[]string{"SR_NOT_ATTACHED", "OpaqueRef:sr"}, SRNotAttached},
		{[]string{"SR_HAS_NO_PBDS", "OpaqueRef:sr"}, SRHasNoPBDs},
		{[]string{"SR_BACKEND_FAILURE_459", "", "Inconsistent bitmaps", ""}, CBTMetadataInconsistent},
		{unrelated, CBTChangedBlocksFailed},
		{unrelated, SRBackendFailure},
		{[]string{"INTERNAL_ERROR", "Storage_interface.Storage_error"}, InternalError},
		{[]string{"MESSAGE_METHOD_UNKNOWN", "VDI.list_changed_blocks"}, MessageMethodUnknown},
		{[]string{"HANDLE_INVALID", "VDI", "OpaqueRef:base"}, HandleInvalid},
		{[]string{"SESSION_INVALID", secret}, SessionInvalid},
		{[]string{"RBAC_PERMISSION_DENIED", "vdi.list_changed_blocks", "no"}, RBACPermissionDenied},
	}
	for _, tt := range tests {
		changed, err := listChanged(t, 1<<40, ok(failureXML(tt.answer...)))
		e, isError := errors.AsType[*Error](err)
		if changed != nil || !isError || !errors.Is(err, tt.want) || e.Method != "VDI.list_changed_blocks" || len(e.Params) != len(tt.answer)-1 {
			t.Errorf("%q: got %v, want code %s", tt.answer, err, tt.want)
		}
	}
	for _, size := range []int64{-1, 0, maxChangedDisk + 1} {
		if _, err := listChanged(t, size, ok(successXML(""))); !errors.Is(err, ErrArgument) {
			t.Errorf("%d bytes: got %v, want ErrArgument", size, err)
		}
	}
}

// The call ends with its context, while xapi works and while it sends the bitmap.
func TestListChangedBlocksCancelled(t *testing.T) {
	answer := ok(successXML(strings.Repeat("A", 1<<20)))
	for _, part := range []string{"", answer[:len(answer)/2]} {
		socket, arrived := listenRaw(t, func(conn net.Conn) {
			io.WriteString(conn, part)
			io.Copy(io.Discard, conn) // until the client hangs up
		})
		ctx, cancel := context.WithCancelCause(t.Context())
		cause := errors.New("the client has left")
		go func() {
			<-arrived
			cancel(cause)
		}()
		_, err := testClient(t, Config{Socket: socket}).Bind(secret).ListChangedBlocks(ctx, "b", "t", 1<<40)
		if !errors.Is(err, cause) || !errors.Is(err, context.Canceled) {
			t.Errorf("after %d bytes: got %v, want the cause", len(part), err)
		}
		if e, ok := errors.AsType[*TransportError](err); !ok || !e.Sent {
			t.Errorf("after %d bytes: got %#v, want a TransportError that was sent", len(part), err)
		}
	}
}

// listenRaw serves one connection; arrived is closed when its request has been read.
func listenRaw(t *testing.T, serve func(net.Conn)) (socket string, arrived chan struct{}) {
	t.Helper()
	socket, arrived = filepath.Join(t.TempDir(), "xapi"), make(chan struct{})
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if req, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			io.Copy(io.Discard, req.Body)
		}
		close(arrived)
		serve(conn)
	}()
	return socket, arrived
}

// An answer of 44.7 MB needs the memory of its bitmap, 33.5 MB, and not that of the
// text; the limit of other replies does not count.
func TestListChangedBlocksMemory(t *testing.T) {
	const size = maxChangedDisk
	bitmap := bytes.Repeat([]byte{0xa0, 0x40, 0, 0}, size/ChangedBlockSize/8/4)
	answer := []byte(ok(successXML(base64.StdEncoding.EncodeToString(bitmap))))
	socket, _ := listenRaw(t, func(conn net.Conn) { conn.Write(answer) })
	s := testClient(t, Config{Socket: socket, MaxResponseBytes: 4096}).Bind(secret)

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	changed, err := s.ListChangedBlocks(t.Context(), "b", "t", size)
	runtime.ReadMemStats(&after)
	if err != nil {
		t.Fatal(err)
	}
	if used, most := after.TotalAlloc-before.TotalAlloc, uint64(len(bitmap)+1<<20); used > most {
		t.Errorf("allocated %d bytes, want at most %d", used, most)
	}
	if !bytes.Equal(changed.bitmap, bitmap) {
		t.Error("the bitmap is another one")
	}
	if got, want := changed.Bytes(), int64(len(bitmap)/4*3*ChangedBlockSize); got != want {
		t.Errorf("got %d changed bytes, want %d", got, want)
	}
}

// Run and Bytes agree with the single blocks, for any bitmap, also a short one.
func TestChangedBlocksRun(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(1, 400*ChangedBlockSize).Draw(t, "size")
		blocks := (size + ChangedBlockSize - 1) / ChangedBlockSize
		sparse := rapid.SampledFrom([]byte{0, 0, 0, 0xff, 0xff, 0xff, 0x01, 0x80, 0xfe, 0x7f, 0x5a})
		bitmap := rapid.SliceOfN(sparse, 0, int(blocks+7)/8).Draw(t, "bitmap")
		has := func(block int64) bool {
			return block/8 >= int64(len(bitmap)) || bitmap[block/8]&(0x80>>(block%8)) != 0
		}
		changed := NewChangedBlocks(size, bitmap)
		off := rapid.Int64Range(0, size-1).Draw(t, "off")
		limit := rapid.Int64Range(1, 2*size).Draw(t, "limit")
		got, n := changed.Run(off, limit)

		end := (off/ChangedBlockSize + 1) * ChangedBlockSize
		for end < size && has(end/ChangedBlockSize) == has(off/ChangedBlockSize) {
			end += ChangedBlockSize
		}
		if want := min(end-off, limit, size-off); got != has(off/ChangedBlockSize) || n != want {
			t.Fatalf("got %t for %d bytes, want %t for %d", got, n, has(off/ChangedBlockSize), want)
		}

		var total int64
		for block := range blocks {
			if has(block) {
				total += min(ChangedBlockSize, size-block*ChangedBlockSize)
			}
		}
		if got := changed.Bytes(); got != total {
			t.Fatalf("got %d changed bytes, want %d", got, total)
		}
	})
}

// A decoded bitmap has the length for the disk and encodes to the same text.
func FuzzDecodeBitmap(f *testing.F) {
	f.Add([]byte("oEA="), int64(16*ChangedBlockSize))
	f.Add([]byte("oA==oA=="), int64(9*ChangedBlockSize))
	f.Add([]byte("AA\nAA"), int64(24*ChangedBlockSize))
	f.Fuzz(func(t *testing.T, text []byte, size int64) {
		if size <= 0 || size > 1<<30 {
			return
		}
		bitmap, err := decodeBitmap(bytes.NewReader(text), size)
		if err != nil {
			return
		}
		if encoded := base64.StdEncoding.EncodeToString(bitmap); encoded != string(text) {
			t.Fatalf("%q was decoded as %q", text, encoded)
		}
		if bits, blocks := int64(len(bitmap))*8, (size+ChangedBlockSize-1)/ChangedBlockSize; bits < blocks-1 || bits >= blocks+8 {
			t.Fatalf("%d bits for %d blocks", bits, blocks)
		}
	})
}
