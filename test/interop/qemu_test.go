package interop

import (
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

var qemuImg = peer{
	name: "qemu-img", programs: []string{"qemu-img"},
	does: map[string]action{
		wholeDisk:   copies(qemuImgCopy),
		randomReads: qemuImgRandom,
		abruptDeath: dies(qemuImgCopy),
		"compare":   qemuImgCompare,
	},
	cannot: map[string]string{pastTheEnd: knowsTheEnd},
	lacks:  map[mode]string{{secure: true, old: true}: asksWithGO},
}

var qemuIO = peer{
	name: "qemu-io", programs: []string{"qemu-io"},
	does: map[string]action{
		randomReads: qemuIORandom,
		pastTheEnd:  qemuIOPastTheEnd,
		abruptDeath: dies(qemuIOReadAll),
	},
	cannot: map[string]string{wholeDisk: "prints what it reads; qemu-img copies by the same code"},
	lacks:  map[mode]string{{secure: true, old: true}: asksWithGO},
}

// qemuSource returns the arguments that describe the disk to qemu's programs: options and a
// name.
func qemuSource(x *exchange) (options []string, name string) {
	if !x.secure {
		return []string{"-f", "raw"}, x.uri()
	}
	host, port := x.hostPort()
	return []string{"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + x.w.trust, "--image-opts"},
		"driver=nbd,server.type=inet,server.host=" + host + ",server.port=" + port + ",export=" + x.name + ",tls-creds=tls0"
}

func qemuImgCopy(x *exchange, out string) *exec.Cmd {
	options, name := qemuSource(x)
	args := append([]string{"convert"}, options...)
	return x.command("qemu-img", append(args, "-O", "raw", name, out)...)
}

// qemu-img dd reads a part of the disk into a file.
func qemuImgRandom(x *exchange) {
	const block = 512
	options, name := qemuSource(x)
	for _, s := range spans[:5] {
		out := x.file("part")
		args := append([]string{"dd"}, options...)
		// Some versions count from the start of the disk.
		x.run(x.command("qemu-img", append(args, "-O", "raw", fmt.Sprintf("bs=%d", block), fmt.Sprintf("skip=%d", s.offset/block),
			fmt.Sprintf("count=%d", (s.offset+s.length)/block), "if="+name, "of="+out)...))
		got, err := os.ReadFile(out)
		if err != nil {
			x.t.Fatal(err)
		}
		x.wantBytes(fmt.Sprintf("%d bytes at %d", s.length, s.offset), got[:min(len(got), s.length)],
			x.content[s.offset:s.offset+s.length])
	}
}

// qemu-img compares byte by byte and prints the result.
func qemuImgCompare(x *exchange) {
	options, name := qemuSource(x)
	if x.secure { // the file's options have to be of the same kind
		args := append([]string{"compare"}, options...)
		x.run(x.command("qemu-img", append(args, name, "driver=raw,file.driver=file,file.filename="+x.contentFile())...))
		return
	}
	args := append([]string{"compare"}, options...)
	x.run(x.command("qemu-img", append(args, "-F", "raw", name, x.contentFile())...))
}

// qemuIO returns a command of qemu-io that executes these commands.
func qemuIOCall(x *exchange, commands ...string) *exec.Cmd {
	options, name := qemuSource(x)
	args := append([]string{"-r"}, options...)
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	return x.command("qemu-io", append(args, name)...)
}

// It discards the data that it reads: it will be killed.
func qemuIOReadAll(x *exchange, _ string) *exec.Cmd {
	var commands []string
	for offset := 0; offset < diskSize; offset += 1 << 20 {
		commands = append(commands, fmt.Sprintf("aio_read -q %d %d", offset, 1<<20))
	}
	return qemuIOCall(x, append(commands, "aio_flush")...)
}

// Many reads in flight; each prints its bytes at its end.
func qemuIORandom(x *exchange) {
	var commands []string
	for _, s := range spans {
		commands = append(commands, fmt.Sprintf("aio_read -v %d %d", s.offset, min(s.length, 8192)))
	}
	out := x.run(qemuIOCall(x, append(commands, "aio_flush")...))
	for _, s := range spans {
		x.wantDump(out, s.offset, min(s.length, 8192))
	}
}

// qemu-io itself refuses reads beyond the size that the service sent. It reads the last
// sector, and the connection goes on.
func qemuIOPastTheEnd(x *exchange) {
	out := x.refused(qemuIOCall(x, fmt.Sprintf("read %d 512", diskSize), fmt.Sprintf("read %d 1024", diskSize-512),
		fmt.Sprintf("read -v %d 512", diskSize-512)))
	if n := strings.Count(out, "read failed: Input/output error"); n != 2 {
		x.t.Errorf("%d reads were refused, want 2:\n%s", n, out)
	}
	x.wantDump(out, diskSize-512, 512)
}

var dumpLine = regexp.MustCompile(`(?m)^([0-9a-f]{8,}):  ((?:[0-9a-f]{2} ){16})`)

// wantDump fails the test unless the output of qemu-io -v has a part of the disk.
func (x *exchange) wantDump(out string, offset, length int) {
	x.t.Helper()
	got, seen := make([]byte, length), make([]bool, length/16)
	for _, line := range dumpLine.FindAllStringSubmatch(out, -1) {
		at, err := strconv.ParseInt(line[1], 16, 64)
		if at -= int64(offset); err != nil || at < 0 || at >= int64(length) {
			continue
		}
		row, err := hex.DecodeString(strings.ReplaceAll(line[2], " ", ""))
		if err != nil {
			x.t.Fatal(err)
		}
		copy(got[at:], row)
		seen[at/16] = true
	}
	for i, ok := range seen {
		if !ok {
			x.t.Fatalf("no line for byte %d in the dump:\n%.2000s", offset+16*i, out)
		}
	}
	x.wantBytes(fmt.Sprintf("%d bytes at %d", length, offset), got, x.content[offset:offset+length])
}
