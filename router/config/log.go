package config

import (
	"encoding"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"strconv"
)

const formatJSON = "json"

// NewLogger returns the process's log.
func NewLogger(w io.Writer, cfg *Config) *slog.Logger {
	return newLogger(w, cfg.LogFormat, cfg.LogLevel)
}

// NewFinalLogger returns the log for the end of a process whose configuration may be
// faulty, and whether that is JSON.
func NewFinalLogger(w io.Writer, src Sources) (log *slog.Logger, asJSON bool) {
	l := newLoader(src)
	_ = l.read("") // what is wrong is said by Load
	return newLogger(w, l.cfg.LogFormat, slog.LevelInfo), l.cfg.LogFormat == formatJSON
}

func newLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level}
	if format == formatJSON {
		opts.ReplaceAttr = func(_ []string, a slog.Attr) slog.Attr {
			a.Value = jsonValue(a.Value)
			return a
		}
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// maxExact is the largest integer that all readers of JSON keep exactly (RFC 8259 §6).
const maxExact = 1<<53 - 1

// jsonValue gives a value the form in JSON that it has as text: a duration its unit,
// a status its word. Numbers that readers would round become strings.
func jsonValue(v slog.Value) slog.Value {
	switch v = v.Resolve(); v.Kind() {
	case slog.KindDuration:
		return slog.StringValue(v.Duration().String())
	case slog.KindUint64:
		if v.Uint64() > maxExact {
			return slog.StringValue(strconv.FormatUint(v.Uint64(), 10))
		}
	case slog.KindInt64:
		if n := v.Int64(); n > maxExact || n < -maxExact {
			return slog.StringValue(strconv.FormatInt(n, 10))
		}
	case slog.KindAny:
		return slog.AnyValue(jsonForm(v.Any()))
	}
	return v
}

func jsonForm(v any) any {
	switch x := v.(type) {
	case json.Marshaler, encoding.TextMarshaler, error:
		return v
	case fmt.Stringer:
		return x.String()
	}
	list := reflect.ValueOf(v)
	if list.Kind() != reflect.Slice {
		return v
	}
	out := make([]any, list.Len())
	for i := range out {
		out[i] = jsonValue(slog.AnyValue(list.Index(i).Interface())).Any()
	}
	return out
}
