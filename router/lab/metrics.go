package lab

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Metrics are the samples of counters and gauges by name.
type Metrics map[string][]Sample

// Sample is one value.
type Sample struct {
	Labels map[string]string
	Value  float64
}

// ParseMetrics reads the text format.
func ParseMetrics(text string) (Metrics, error) {
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(strings.NewReader(text + "\n")) // get trims it
	if err != nil {
		return nil, fmt.Errorf("parse metrics: %w", err)
	}
	m := Metrics{}
	for name, f := range families {
		for _, s := range f.GetMetric() {
			one := Sample{Labels: map[string]string{}}
			for _, l := range s.GetLabel() {
				one.Labels[l.GetName()] = l.GetValue()
			}
			switch {
			case s.Counter != nil:
				one.Value = s.Counter.GetValue()
			case s.Gauge != nil:
				one.Value = s.Gauge.GetValue()
			default:
				continue
			}
			m[name] = append(m[name], one)
		}
	}
	return m, nil
}

// Sum adds up the samples of a name that have the given labels.
func (m Metrics) Sum(name string, labels map[string]string) float64 {
	sum := 0.0
next:
	for _, s := range m[name] {
		for k, v := range labels {
			if s.Labels[k] != v {
				continue next
			}
		}
		sum += s.Value
	}
	return sum
}

// By adds up the samples of a name for each value of a label.
func (m Metrics) By(name, label string) map[string]float64 {
	out := map[string]float64{}
	for _, s := range m[name] {
		out[s.Labels[label]] += s.Value
	}
	return out
}

// sortedNonZero lists what is not zero, in the order of the names.
func sortedNonZero(m map[string]float64) []string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if m[k] != 0 {
			out = append(out, fmt.Sprintf("%s %.0f", k, m[k]))
		}
	}
	return out
}
