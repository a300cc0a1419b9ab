package main

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/internal/manpages"
)

// TestManPagesSettings: xapi-nbd.toml(5) has every key of the settings, with type and default
// from package config and the description from the example file.
func TestManPagesSettings(t *testing.T) {
	example, err := os.ReadFile("../../packaging/xapi-nbd.toml")
	if err != nil {
		t.Fatal(err)
	}
	meanings := exampleComments(string(example))
	edition, err := manpages.CurrentEdition("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	page := manpages.SettingsPage{
		Name: "xapi-nbd.toml", Summary: "settings of xapi-nbd",
		Intro: "Settings of xapi-nbd, in TOML, read from " + config.DefaultFile + " when that file exists, or from the file " +
			"that --config names. A flag beats this file, this file beats the default. An unknown key is an error. " +
			"Durations are strings with a unit.",
		Files:   []manpages.File{{Path: config.DefaultFile, Text: "Installed with every key commented out at its default."}},
		Edition: edition,
		See:     "xapi-nbd(8), xapi-nbd-serve(8)",
	}
	for _, s := range configSettings() {
		s.Text = meanings[s.Key]
		if s.Text == "" {
			t.Errorf("packaging/xapi-nbd.toml says nothing of %s", s.Key)
		}
		delete(meanings, s.Key)
		page.Settings = append(page.Settings, s)
	}
	for key := range meanings {
		t.Errorf("packaging/xapi-nbd.toml explains %s, which is no setting", key)
	}
	dir := manpages.Dir(t.TempDir())
	if err := page.Write(dir); err != nil {
		t.Fatal(err)
	}
	written, err := os.ReadFile(filepath.Join(dir, "xapi-nbd.toml.5"))
	if err != nil {
		t.Fatal(err)
	}
	manpages.Lint(t, dir, "xapi-nbd.toml.5")
	text := strings.ReplaceAll(string(written), `\-`, "-")
	for _, want := range []string{
		`.BR port " (number; default 10809; flag --port)"`,
		`.BR linger " (duration; default \(dq1.5s\(dq)"`,
		`.BR max_inflight_bytes " (bytes; default \(dq64 MiB\(dq)"`,
		`.BR listen " (array of strings; flag --listen)"`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %s", want)
		}
	}
	for _, s := range page.Settings {
		if !strings.Contains(text, "\n.BR "+s.Key+" ") {
			t.Errorf("the page lacks %s", s.Key)
		}
	}
}

// configSettings describes the fields of config, in their order.
func configSettings() []manpages.Setting {
	cfg := config.Default()
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	config.BindFlags(flags, &cfg)
	var settings []manpages.Setting
	value := reflect.ValueOf(cfg)
	for i := range value.NumField() {
		key := value.Type().Field(i).Tag.Get("toml")
		if key == "" {
			continue
		}
		s := manpages.Setting{Key: key}
		s.Type, s.Default = spell(value.Field(i).Interface())
		if name := strings.ReplaceAll(key, "_", "-"); flags.Lookup(name) != nil {
			s.Flag = name
		}
		settings = append(settings, s)
	}
	return settings
}

// spell returns the type of a setting and the spelling of its value in the file, "" without a
// value.
func spell(value any) (kind, text string) {
	switch v := value.(type) {
	case int:
		return "number", strconv.Itoa(v)
	case float64:
		return "number", strconv.FormatFloat(v, 'g', -1, 64)
	case bool:
		return "boolean", strconv.FormatBool(v)
	case config.Duration:
		return "duration", strconv.Quote(manpages.Duration(time.Duration(v)))
	case config.ByteSize:
		if text := manpages.Bytes(int64(v)); strings.Contains(text, " ") {
			return "bytes", strconv.Quote(text)
		}
		return "bytes", strconv.FormatInt(int64(v), 10)
	case []string:
		return "array of strings", ""
	case string:
		if v == "" {
			return "string", ""
		}
		return "string", strconv.Quote(v)
	}
	panic(fmt.Sprintf("a setting of type %T is not known here", value))
}

// exampleComments returns the comment above each setting of the example file.
func exampleComments(text string) map[string]string {
	meanings := make(map[string]string)
	var comment strings.Builder
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		words, isComment := strings.CutPrefix(line, "# ")
		key, _, isSetting := strings.Cut(strings.TrimPrefix(line, "#"), " = ")
		switch {
		case isComment:
			comment.WriteString(words + "\n")
		case isSetting:
			meanings[key] = strings.TrimSuffix(comment.String(), "\n")
			comment.Reset()
		default:
			comment.Reset()
		}
	}
	return meanings
}
