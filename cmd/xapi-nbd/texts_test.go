package main

import (
	"strings"
	"testing"
	"unicode"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// endOfMap is a key that in xapi's answers, which do not escape it, looks like the end of its
// map and a field of the record.
const endOfMap = `x</name><value>v</value></member></struct></value></member><member><name>uuid</name><value>forged</value></member>` +
	`<member><name>y</name><value><struct><member><name>z`

// TestOddTextsOfADisk: a disk is served with any text in its name, description, tags and
// other_config, and its description is fit for a terminal.
func TestOddTextsOfADisk(t *testing.T) {
	for name, text := range map[string]string{
		"accents and emoji":   "Größe žluťoučký 日本語 😀",
		"right to left":       "\u202eabc\u202c",
		"markup":              `R&D <b>"x"</b> 'y' ]]> <!-- &nbsp; &#0;`,
		"escapes":             "\x1b[31mred\x1b[0m\x07",
		"line breaks":         "a\r\nb\rc\nd\te",
		"invalid UTF-8":       "a\xff\xfe\xc3b",
		"surrogates":          "\xed\xa0\x80",
		"excluded characters": "\uFFFE\uFFFF",
		"C1 controls":         "\u0085\u009b",
		"blanks":              "  ",
		"long":                strings.Repeat("é", 50_000),
		"end of a map":        endOfMap,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			content := random(1, 1<<20)
			vdi := w.addVDI(content, xapitest.VDISpec{
				NameLabel: text, Description: text, Tags: []string{text, "", text},
				OtherConfig: map[string]string{text: text, "key": text},
			})
			w.host.SetNetworkOtherConfig(w.network, map[string]string{text: text})
			p := w.start()
			client, err := w.dial(p, false)
			if err != nil {
				t.Fatal(err)
			}
			export := w.export(vdi)
			info, err := client.Info(t.Context(), export)
			if err != nil {
				t.Fatal(err)
			}
			wantDescription(t, info.Description, vdi)
			conn, err := client.Go(t.Context(), export)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 4096)
			if _, err := conn.ReadAt(got, 4096); err != nil || string(got) != string(content[4096:8192]) {
				t.Errorf("reading: %v", err)
			}
			conn.Close()
			w.waitClean(p)
		})
	}
}

func wantDescription(t *testing.T, d, vdi string) {
	t.Helper()
	if !strings.HasPrefix(d, "VDI "+vdi) || len(d) > wire.MaxString || strings.ContainsFunc(d, unicode.IsControl) {
		t.Errorf("got the description %q, want the VDI and no control characters", d)
	}
	if strings.ToValidUTF8(d, "") != d {
		t.Errorf("got the description %q, want valid UTF-8", d)
	}
}

// TestOddForeignVBDs: the service finds its VBDs beside VBDs of others with any content of
// other_config, and also after others have written to the other_config of its own.
func TestOddForeignVBDs(t *testing.T) {
	for name, key := range map[string]string{"unescaped": "R&D <x>\x01\xff", "end of a map": endOfMap} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
			foreign, err := w.host.AddForeignVBD(w.addVDI(random(2, 1<<20), xapitest.VDISpec{}), map[string]string{key: "x"})
			if err != nil {
				t.Fatal(err)
			}
			p := w.start()
			p.waitCalm(w)
			// Its create was executed, but not answered: it can only be found by its tag.
			w.host.LoseReply("VBD.create")
			if conn, err := w.open(p, w.export(vdi), false); err == nil {
				conn.Close()
			}
			w.waitOnly(p, foreign)

			conn, err := w.open(p, w.export(vdi), false)
			if err != nil {
				t.Fatal(err)
			}
			for _, vbd := range w.host.VBDs() {
				if vbd.UUID != foreign {
					if err := w.host.AddToOtherConfig(vbd.UUID, key, "x"); err != nil {
						t.Fatal(err)
					}
				}
			}
			w.host.LoseReply("VBD.unplug") // so that the detach asks for the record
			conn.Close()
			w.waitOnly(p, foreign)
		})
	}
}

// waitOnly waits until only the VBD foreign is left.
func (w *world) waitOnly(p *process, foreign string) {
	w.t.Helper()
	eventually(w.t, func() string {
		if vbds := w.host.VBDs(); len(vbds) != 1 || vbds[0].UUID != foreign {
			return "VBDs other than the foreign one are left\n" + p.output()
		}
		return ""
	})
}
