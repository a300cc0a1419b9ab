package interop

import (
	"fmt"

	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// nbdkit is a client and serves the data to a client of its own.
var nbdkit = peer{
	name: "nbdkit, as a proxy", programs: []string{"nbdkit", "nbdcopy", "nbdsh"},
	does: map[string]action{
		wholeDisk:   copies(nbdkitCopy),
		randomReads: nbdkitRandom,
		abruptDeath: dies(nbdkitCopy),
	},
	cannot: map[string]string{pastTheEnd: "refuses by itself what goes beyond the end"},
	lacks:  map[mode]string{{secure: true, old: true}: asksWithGO},
}

// proxy returns a command of nbdkit that ends with a shell command, in which $uri is the URI
// of nbdkit.
func (x *exchange) proxy(run string, env ...string) *exec.Cmd {
	host, port := x.hostPort()
	args := []string{"-U", "-", "nbd", "hostname=" + host, "port=" + port, "export=" + x.name}
	if x.secure {
		args = append(args, "tls=require", "tls-certificates="+x.w.trust)
	}
	cmd := x.command("nbdkit", append(args, "--run", run)...)
	cmd.Env = append(cmd.Env, env...)
	return cmd
}

func nbdkitCopy(x *exchange, out string) *exec.Cmd {
	return x.proxy(`nbdcopy "$uri" "$OUT"`, "OUT="+out)
}

func nbdkitRandom(x *exchange) {
	out := x.file("spans")
	x.run(x.proxy(`nbdsh -u "$uri" -c "$SCRIPT"`, "SCRIPT="+readAhead+fmt.Sprintf("read(%s, %q)\nh.shutdown()\n", pythonSpans(), out)))
	x.wantSpans(out)
}

// fio verifies the data by checksums that it has written into the image before.
var fio = peer{
	name: "fio", programs: []string{"fio"},
	does: map[string]action{
		wholeDisk:   fioReads("read"),
		randomReads: fioReads("randread"),
		abruptDeath: dies(func(x *exchange, _ string) *exec.Cmd { return fioCall(x, "read") }),
	},
	cannot: map[string]string{pastTheEnd: knowsTheEnd},
	lacks:  map[mode]string{{secure: true, old: true}: asksWithGO},
	disk: func(t *testing.T, w *world) string {
		x := &exchange{w: w, t: t}
		path := filepath.Join(w.dir, "image-fio")
		x.run(x.command("fio", append(fioJob, "--ioengine=psync", "--filename="+path, "--rw=write", "--do_verify=0")...))
		return w.addImage(t, path)
	},
}

var fioJob = []string{
	"--name=disk", "--bs=16k", fmt.Sprintf("--size=%d", diskSize), "--verify=crc32c", "--verify_fatal=1", "--thread", "--randseed=1",
}

// fio has no option for the CA, so it verifies no certificate.
func fioCall(x *exchange, rw string) *exec.Cmd {
	uri, _, _ := strings.Cut(x.uri(), "?tls-certificates=")
	return x.command("fio", append(fioJob, "--ioengine=nbd", "--uri="+uri, "--rw="+rw, "--iodepth=16")...)
}

func fioReads(rw string) action {
	return func(x *exchange) {
		out := x.run(fioCall(x, rw))
		if want := fmt.Sprintf("issued rwts: total=%d,0,0,0", diskSize/(16<<10)); !strings.Contains(out, want) {
			x.t.Errorf("fio does not say %q:\n%s", want, out)
		}
	}
}

var nbdClient = peer{
	name: "nbd-client", programs: []string{"nbd-client"}, version: []string{"-V"},
	does: map[string]action{"list": nbdClientList},
	cannot: map[string]string{
		wholeDisk:   needsTheKernel,
		randomReads: needsTheKernel,
		pastTheEnd:  needsTheKernel,
		abruptDeath: needsTheKernel,
	},
	lacks: map[mode]string{
		{secure: false, old: true}: "asks with EXPORT_NAME only to attach: " + needsTheKernel,
		{secure: true, old: true}:  "asks with EXPORT_NAME only to attach: " + needsTheKernel,
	},
}

const needsTheKernel = "needs the kernel's module; see the kernel's own tests"

// The service refuses to list, with the reason, and plugs nothing.
func nbdClientList(x *exchange) {
	host, port := x.hostPort()
	args := []string{"-l", host, port}
	if x.secure {
		args = append(args, "-A", filepath.Join(x.w.trust, "ca-cert.pem"))
	}
	if out := x.refused(x.command("nbd-client", args...)); !strings.Contains(out, "exports are not listed") {
		x.t.Errorf("nbd-client does not tell the service's reason:\n%s", out)
	}
}
