package kube

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/selection"
)

func nodesResource() schema.GroupVersionResource {
	return corev1.SchemeGroupVersion.WithResource("nodes")
}

// matches says whether a node has what a selector asks for, as the scheduler
// understands it: one of the terms, and of that everything; an empty term is
// satisfied by nobody. What is not understood is not satisfied.
func matches(s *corev1.NodeSelector, name string, nodeLabels map[string]string) bool {
	return slices.ContainsFunc(s.NodeSelectorTerms, func(term corev1.NodeSelectorTerm) bool {
		if len(term.MatchExpressions)+len(term.MatchFields) == 0 {
			return false
		}
		lacks := func(r corev1.NodeSelectorRequirement) bool { return !hasLabel(r, nodeLabels) }
		differs := func(r corev1.NodeSelectorRequirement) bool { return !hasName(r, name) }
		return !slices.ContainsFunc(term.MatchExpressions, lacks) && !slices.ContainsFunc(term.MatchFields, differs)
	})
}

func hasLabel(r corev1.NodeSelectorRequirement, nodeLabels map[string]string) bool {
	operators := map[corev1.NodeSelectorOperator]selection.Operator{
		corev1.NodeSelectorOpIn: selection.In, corev1.NodeSelectorOpNotIn: selection.NotIn,
		corev1.NodeSelectorOpExists: selection.Exists, corev1.NodeSelectorOpDoesNotExist: selection.DoesNotExist,
		corev1.NodeSelectorOpGt: selection.GreaterThan, corev1.NodeSelectorOpLt: selection.LessThan,
	}
	requirement, err := labels.NewRequirement(r.Key, operators[r.Operator], r.Values)
	return err == nil && requirement.Matches(labels.Set(nodeLabels))
}

func hasName(r corev1.NodeSelectorRequirement, name string) bool {
	if r.Key != "metadata.name" || len(r.Values) != 1 {
		return false
	}
	switch r.Operator {
	case corev1.NodeSelectorOpIn:
		return r.Values[0] == name
	case corev1.NodeSelectorOpNotIn:
		return r.Values[0] != name
	}
	return false
}
