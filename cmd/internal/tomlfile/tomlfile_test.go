package tomlfile_test

import (
	"reflect"
	"testing"

	"github.com/BurntSushi/toml"

	"xapi-nbd/cmd/internal/tomlfile"
)

type file struct {
	Size   int `toml:"size"`
	Inside struct {
		Name string `toml:"name"`
	} `toml:"inside"`
	Many []struct {
		Name string `toml:"name"`
	} `toml:"many"`
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct{ name, text, want, message string }{
		{"syntax", "size = 1\ninside =\n", `line 2: inside: expected value but found '\n' instead`, `expected value but found '\n' instead`},
		{"type", "\nsize = \"x\"\n", "line 2: size: incompatible types: TOML value has type string; destination has type integer", "incompatible types: TOML value has type string; destination has type integer"},
	} {
		_, err := toml.Decode(tt.text, &file{})
		if err == nil {
			t.Errorf("%s: no error", tt.name)
			continue
		}
		if got := tomlfile.Error(err).Error(); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
		if got := tomlfile.Message(err); got != tt.message {
			t.Errorf("%s: got message %q, want %q", tt.name, got, tt.message)
		}
	}
}

func TestUnknown(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"none", "size = 1\n[inside]\nname = 'x'\n", ""},
		{"at the top", "size = 1\n\nsice = 2\n", `line 3: unknown key "sice"`},
		{"in a table", "size = 1\n[inside]\nsize = 2\n", `line 3: unknown key "inside.size"`},
		{"in the second of several tables", "[[many]]\nname = 'a'\n[[many]] # b\n'sice' = 2\n", `line 4: unknown key "many.sice"`},
		{"table", "size = 1\n[ other ] # no such\nname = 2\n", `line 2: unknown key "other"`},
		{"in another case", "size = 1\nSize = 2\n", `line 2: unknown key "Size"; it is spelt "size"`},
		{"table in another case", "[Inside]\nname = 'x'\n", `line 1: unknown key "Inside"; it is spelt "inside"`},
		{"in a table, in another case", "[[many]]\nname = 'x'\n[[many]]\nNAME = 'y'\n", `line 4: unknown key "many.NAME"; it is spelt "many.name"`},
		{"letter that folds to another", "\"\u017fize\" = 2\n", `line 1: unknown key "\"ſize\""; it is spelt "size"`},
		{"dotted", "size = 1\ninside.sice = 2\n", `line 2: unknown key "inside.sice"`},
	} {
		meta, err := toml.Decode(tt.text, &file{})
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		got := ""
		if err := tomlfile.Unknown(tt.text, meta, file{}); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestTableLines(t *testing.T) {
	text := "size = 1\n[[many]]\nname = 'a'\n\n [[ many ]] # second\n[inside]\n"
	if got := tomlfile.TableLines(text, "many"); !reflect.DeepEqual(got, []int{2, 5}) {
		t.Errorf("got %v", got)
	}
}
