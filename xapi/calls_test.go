package xapi

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The struct of VBD.create has all members, bools as <boolean>: xapi answers a missing one
// with INTERNAL_ERROR.
func TestCreateVBDOnTheWire(t *testing.T) {
	r := respond(t, always(ok(successXML("OpaqueRef:vbd"))))
	s := testClient(t, Config{Socket: r.Socket}).Bind(secret)
	ref, err := s.CreateVBD(t.Context(), VBDSpec{VM: "OpaqueRef:dom0", VDI: "OpaqueRef:vdi", OtherConfig: map[string]string{"xapi-nbd:host": "h"}})
	if err != nil || ref != "OpaqueRef:vbd" {
		t.Fatalf("got %q, %v, want OpaqueRef:vbd", ref, err)
	}
	text := func(name, value string) string { return member(name, "<string>"+value+"</string>") }
	flag := func(name, value string) string { return member(name, "<boolean>"+value+"</boolean>") }
	want := `<value><struct>` + text("VM", "OpaqueRef:dom0") + text("VDI", "OpaqueRef:vdi") + text("userdevice", "autodetect") +
		flag("bootable", "0") + text("mode", "RO") + text("type", "Disk") + flag("empty", "0") +
		member("other_config", "<struct>"+text("xapi-nbd:host", "h")+"</struct>") +
		text("qos_algorithm_type", "") + member("qos_algorithm_params", "<struct></struct>") +
		flag("unpluggable", "1") + text("device", "") + flag("currently_attached", "0") + `</struct></value>`
	if got := r.seen()[0].body; !strings.Contains(got, want) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if _, err := s.CreateVBD(t.Context(), VBDSpec{VM: "OpaqueRef:dom0", VDI: "OpaqueRef:vdi", Write: true}); err != nil {
		t.Fatal(err)
	}
	if got := r.seen()[1].body; !strings.Contains(got, text("mode", "RW")) {
		t.Errorf("for writing: got %s, want mode RW", got)
	}
}

func TestVDIRecord(t *testing.T) {
	record := func(size string) string {
		return "<struct>" + member("uuid", "u") + member("name_label", "&lt;fault&gt;x&lt;/fault&gt; ") + member("name_description", "") +
			member("type", "brand_new") + member("virtual_size", size) + member("SR", "OpaqueRef:sr") + member("location", "l") +
			member("managed", "<boolean>1</boolean>") + member("missing", "<boolean>0</boolean>") + member("read_only", "<boolean>0</boolean>") +
			member("is_a_snapshot", "<boolean>1</boolean>") + member("sharable", "<boolean>1</boolean>") + member("sm_config", "<struct>"+member("host_OpaqueRef:h", "RO")+"</struct>") + member("current_operations", "<struct>"+member("OpaqueRef:task", "data_destroy")+"</struct>") + member("invented_tomorrow", "<struct></struct>") + "</struct>"
	}
	const largest = 1<<63 - 1
	want := VDIRecord{UUID: "u", NameLabel: "<fault>x</fault> ", Type: "brand_new", VirtualSize: largest, SR: "OpaqueRef:sr", Location: "l", Managed: true, IsSnapshot: true, Sharable: true, SMConfig: map[string]string{"host_OpaqueRef:h": "RO"},
		CurrentOperations: map[string]string{"OpaqueRef:task": "data_destroy"}}
	r := respond(t, always(ok(successXML(record("9223372036854775807")))))
	got, err := testClient(t, Config{Socket: r.Socket}).Bind(secret).VDIRecord(t.Context(), "OpaqueRef:vdi")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
	for _, size := range []string{"", "-1", "1e9", "9223372036854775808", secret} {
		r := respond(t, always(ok(successXML(record(size)))))
		_, err := testClient(t, Config{Socket: r.Socket}).Bind(secret).VDIRecord(t.Context(), "OpaqueRef:vdi")
		if _, ok := errors.AsType[*TransportError](err); !ok {
			t.Errorf("size %q: got %v, want a TransportError", size, err)
		}
	}
}

func TestVBDsOfVM(t *testing.T) {
	record := "<struct>" + member("device", "") + member("userdevice", "0") + member("uuid", "u") + member("VM", "OpaqueRef:vm") + member("VDI", "OpaqueRef:vdi") +
		member("currently_attached", "<boolean>1</boolean>") + member("mode", "RO") + member("other_config", "<struct>"+member("k", "v")+"</struct>") +
		member("current_operations", "<struct>"+member("OpaqueRef:task", "unplug")+"</struct>") + "</struct>"
	r := respond(t, always(ok(successXML("<struct>"+member("OpaqueRef:1", record)+"</struct>"))))
	got, err := testClient(t, Config{Socket: r.Socket}).Bind(secret).VBDsOfVM(t.Context(), "OpaqueRef:vm")
	if err != nil {
		t.Fatal(err)
	}
	want := map[VBDRef]VBDRecord{"OpaqueRef:1": {
		UUID: "u", VM: "OpaqueRef:vm", VDI: "OpaqueRef:vdi", UserDevice: "0", CurrentlyAttached: true, Mode: "RO", OtherConfig: map[string]string{"k": "v"},
		CurrentOperations: map[string]string{"OpaqueRef:task": "unplug"},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
	if body := r.seen()[0].body; !strings.Contains(body, `<string>field &#34;VM&#34;=&#34;OpaqueRef:vm&#34;</string>`) {
		t.Errorf("no filter expression in %s", body)
	}
}
